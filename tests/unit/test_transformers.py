"""R27 R32: a Hugging Face Trainer goes on where it was, bit for bit, from our checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import dcpsvc
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

    transformers.set_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    given = transformers.TrainingArguments(
        output_dir=str(folder / "out"), max_steps=20, per_device_train_batch_size=4, save_steps=4, logging_steps=4,
        report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2, **arguments,
    )  # fmt: skip
    made = Ours(model=transformers.GPT2LMHeadModel(config), args=given, train_dataset=Samples())
    made.seen = []
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
