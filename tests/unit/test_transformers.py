"""R27 R32: a Hugging Face Trainer goes on where it was, bit for bit, from our checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import dcpsvc
from dcpsvc.errors import NoSuchStepError, StepExistsError
from tests.unit.one_process import told

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),  # theirs
]


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(16, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


SCORES = {4: 0.3, 8: 0.9, 12: 0.5, 16: 0.9, 20: 0.7}
SCORED = {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "score", "greater_is_better": True}
"""Of equal ones the older is the best: step 8."""


class Interrupted(Exception):  # noqa: N818 - as a kill would be
    pass


def trainer(folder: Path, *, root: Path | None = None, until: int | None = None, **arguments: Any) -> Any:
    from dcpsvc.integrations.transformers import Checkpointed

    class Ours(Checkpointed, transformers.Trainer):
        checkpoint_root = root or folder / "root"
        checkpoint_options = {"local": folder / "local", "save_last": False}  # noqa: RUF012 - read only

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == until:
                raise Interrupted
            self.seen.append([tuple(row) for row in args[1]["input_ids"].tolist()])
            return super().training_step(*args, **kwargs)

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            """Scores of the test's own, told as an evaluation tells them."""
            step = self.state.global_step
            found = {"eval_score": self.scores[step]} if step in self.scores else {"eval_other": 0.0}
            self.weights[step] = told(dict(self.model.state_dict()))
            self.log(dict(found))
            self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
            return found

    transformers.set_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    given = transformers.TrainingArguments(
        output_dir=str(folder / "out"), max_steps=20, per_device_train_batch_size=4, logging_steps=4,
        report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2, **({"save_steps": 4} | arguments),
    )  # fmt: skip
    made = Ours(model=transformers.GPT2LMHeadModel(config), args=given, train_dataset=Samples(), eval_dataset=Samples())
    made.seen, made.scores, made.weights = [], dict(SCORES), {}
    return made


def outcome(made: Any) -> Any:
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return told(dict(made.model.state_dict())), losses, made.state.global_step


def test_a_trainer_killed_between_two_saves_goes_on_bit_for_bit_inside_the_epoch(tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight")
    straight.train()
    first = trainer(tmp_path, until=13)
    with pytest.raises(Interrupted):
        first.train(resume_from_checkpoint=True)  # nothing to resume from: fresh
    assert [found.step for found in dcpsvc.list_checkpoints(tmp_path / "root")] == [4, 8, 12]
    second = trainer(tmp_path)
    second.train(resume_from_checkpoint=True)
    assert second.seen == straight.seen[12:]
    assert outcome(second) == outcome(straight)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_limit_of_the_trainer_is_kept_and_metrics_are_recorded(tmp_path: Path) -> None:
    trainer(tmp_path, save_total_limit=2).train()
    found = dcpsvc.list_checkpoints(tmp_path / "root")
    assert [checkpoint.step for checkpoint in found] == [16, 20]
    assert found[-1].metrics["loss"] > 0


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in dcpsvc.list_checkpoints(folder / "root")]


def test_the_best_checkpoint_stays_beside_the_newest_and_is_loaded_at_the_end(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_total_limit=1, load_best_model_at_end=True, **SCORED)
    made.train()
    assert steps(tmp_path) == [8, 20]
    assert told(dict(made.model.state_dict())) == made.weights[8] != made.weights[20]
    assert made.state.best_model_checkpoint == f"{tmp_path / 'root'}/checkpoint-8"


def test_the_last_checkpoint_holds_the_last_model_although_the_best_is_loaded(tmp_path: Path) -> None:
    made = trainer(tmp_path, load_best_model_at_end=True, save_strategy="best", **SCORED)
    made.checkpoint_options = made.checkpoint_options | {"save_last": True}
    made.train()
    assert steps(tmp_path) == [4, 8, 20]  # of the last step it is dcpsvc that saves it
    loaded = {"model": transformers.GPT2LMHeadModel(made.model.config)}
    dcpsvc.load(tmp_path / "root", loaded, 20)
    assert told(dict(loaded["model"].state_dict())) == made.weights[20]


def test_an_evaluation_of_a_step_that_dcpsvc_saves_is_recorded_with_it(tmp_path: Path) -> None:
    made = trainer(tmp_path, **(SCORED | {"save_steps": 30}))
    made.checkpoint_options = made.checkpoint_options | {"every": dcpsvc.Every(steps=8), "save_last": True}
    made.train()
    found = dcpsvc.list_checkpoints(tmp_path / "root")
    assert {one.step: one.metrics.get("eval_score") for one in found} == {8: 0.9, 16: 0.9, 20: 0.7}


def test_a_best_checkpoint_of_before_a_kill_is_loaded_after_the_resume(tmp_path: Path) -> None:
    arguments = {"save_total_limit": 1, "load_best_model_at_end": True, **SCORED}
    first = trainer(tmp_path, until=13, **arguments)
    with pytest.raises(Interrupted):
        first.train()
    second = trainer(tmp_path, **arguments)
    second.train(resume_from_checkpoint=True)
    assert told(dict(second.model.state_dict())) == first.weights[8]


def test_without_a_metric_on_any_checkpoint_it_is_said_that_the_last_model_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(tmp_path, load_best_model_at_end=True, **(SCORED | {"save_steps": 8}))
    made.scores = {}
    made._determine_best_metric = lambda **_: False
    made.train()
    assert "no checkpoint has eval_score: the last model stays, not the best" in caplog.text


@pytest.mark.parametrize("named", [8, "{root}/checkpoint-8"])
def test_a_trainer_goes_on_from_the_step_that_is_named(tmp_path: Path, named: int | str) -> None:
    straight = trainer(tmp_path / "straight")
    straight.train()
    trainer(tmp_path).train()
    second = trainer(tmp_path)
    second.train(resume_from_checkpoint=named if isinstance(named, int) else named.format(root=tmp_path / "root"))
    assert second.seen == straight.seen[8:]
    assert outcome(second) == outcome(straight)


def test_a_named_step_that_is_not_there_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    second = trainer(tmp_path)
    with pytest.raises(NoSuchStepError, match="step 5"):
        second.train(resume_from_checkpoint=5)
    assert second.seen == []


def test_a_trainer_that_forgot_to_resume_is_told_at_its_first_save(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    with pytest.raises(StepExistsError):
        trainer(tmp_path).train()


def test_a_stop_saves_its_step_and_ends_the_training(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.checkpoint_options = made.checkpoint_options | {"save_last": True}

    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                made._checkpointer.request_stop()

    made.add_callback(Stop())
    made.train()
    steps = [found.step for found in dcpsvc.list_checkpoints(tmp_path / "root")]
    assert steps[-1] == made.state.global_step < 20
    assert steps[-1] > 7


def test_a_root_that_cannot_be_used_is_said_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    made = trainer(tmp_path, root=tmp_path / "file")
    with pytest.raises(dcpsvc.RootError):
        made.train()
    assert made.seen == []
