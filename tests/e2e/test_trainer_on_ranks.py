"""R27 R32: a Hugging Face Trainer under torchrun, killed: it goes on in the data, and its best stays and is loaded."""

import json
import os
import subprocess

import pytest

import dcpsvc
from tests.e2e.jobs import ENVIRONMENT, TORCHRUN

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.timeout(300)

TRAINER = """
import hashlib, json, os, signal, sys, warnings
from pathlib import Path

warnings.simplefilter("ignore")
import torch, transformers
from dcpsvc.integrations.transformers import Checkpointed

folder, until = Path(sys.argv[1]), int(sys.argv[2])
SCORES = {3: 0.3, 6: 0.9, 9: 0.5, 12: 0.7}

class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = torch.randint(16, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}

class Ours(Checkpointed, transformers.Trainer):
    checkpoint_root = folder / "root"
    checkpoint_options = {"local": folder / "local", "save_last": False}
    weights, seen = {}, []

    def training_step(self, *args, **kwargs):
        if self.state.global_step == until:
            self._checkpointer.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append((self.state.global_step, args[1]["input_ids"].tolist()))
        return super().training_step(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        found = {"eval_score": SCORES[self.state.global_step]}
        self.weights[self.state.global_step] = digest(self.model)
        self.log(dict(found))
        return found

def digest(model):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()

transformers.set_seed(0)
config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
given = transformers.TrainingArguments(
    output_dir=str(folder / "out"), max_steps=12, per_device_train_batch_size=2, save_steps=3, use_cpu=True,
    report_to=[], disable_tqdm=True, learning_rate=1e-2, ddp_backend="gloo", eval_strategy="steps", eval_steps=3,
    metric_for_best_model="score", greater_is_better=True, load_best_model_at_end=True, save_total_limit=1,
)
made = Ours(model=transformers.GPT2LMHeadModel(config), args=given, train_dataset=Samples(), eval_dataset=Samples())
made.train(resume_from_checkpoint=True)
told = {"seen": made.seen, "weights": made.weights, "last": digest(made.model), "best": made.state.best_global_step}
told |= {"metric": made.state.best_metric, "wrapped": type(made.model_wrapped).__name__}
(folder / f"{os.environ['RANK']}.json").write_text(json.dumps(told))
"""


def train(folder, until=-1):
    folder.mkdir(exist_ok=True)
    (folder / "trainer.py").write_text(TRAINER)
    start = [*TORCHRUN, str(folder / "trainer.py"), str(folder), str(until)]
    environment = os.environ | ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
    return subprocess.run(start, env=environment, capture_output=True, text=True, timeout=120, check=False)


def told(folder):
    done = train(folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all, what each rank tells of a run without a break, and of one that was killed after step 8."""
    folder = tmp_path_factory.mktemp("trainer")
    assert train(folder / "run", until=8).returncode != 0
    assert not list((folder / "run").glob("*.json"))
    return folder, told(folder / "straight"), told(folder / "run")


def test_a_trainer_of_two_ranks_killed_goes_on_inside_the_epoch(runs):
    _, straight, resumed = runs
    for one, other in zip(resumed, straight, strict=True):
        assert one["seen"] == [each for each in other["seen"] if each[0] >= 6]
        assert one["weights"] == {step: other["weights"][step] for step in ("9", "12")}
        assert one["wrapped"] == "DistributedDataParallel"
    assert resumed[0]["weights"] == resumed[1]["weights"]
    assert resumed[0]["seen"] != resumed[1]["seen"]  # each rank its own data


def test_the_best_of_two_ranks_under_torchrun_outlives_a_kill_and_is_loaded_at_the_end(runs):
    folder, straight, resumed = runs
    for one in (*straight, *resumed):
        assert (one["best"], one["metric"]) == (6, 0.9)
        assert one["last"] == straight[0]["weights"]["6"] != straight[0]["weights"]["12"]
    for name in ("straight", "run"):
        assert [each.step for each in dcpsvc.list_checkpoints(folder / name / "root")] == [6, 12]
