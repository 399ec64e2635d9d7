"""R34: the example of a LoRA trainer, run with torchrun, stopped and run again: as one run, with ready PEFT folders."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dcpsvc

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "examples" / "train_lora.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),  # theirs
]


def train(folder: Path, steps: int, ranks: int) -> set[str]:
    """The lines it printed: rank, step and loss to the last bit."""
    arguments = [str(SCRIPT), "--root", str(folder / "run"), "--nvme", str(folder / "local"), "--steps", str(steps)]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, *start, *arguments], capture_output=True, text=True, timeout=200, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return set(re.findall(r"rank \d+ step \d+ loss [-+.0-9a-fx]+p[-+]\d+", done.stdout))


def test_the_example_stopped_half_way_goes_on_as_one_run_and_leaves_peft_folders(tmp_path: Path) -> None:
    whole = train(tmp_path / "straight", 20, 2)
    first = train(tmp_path / "pieces", 10, 2)
    assert len(whole) == 40
    second = train(tmp_path / "pieces", 20, 2)
    assert (len(first), len(second)) == (20, 20)
    assert first | second == whole
    folders = sorted((tmp_path / "pieces" / "run" / "data").glob("step-*/adapter"))
    assert [folder.parent.name.split(".")[0] for folder in folders] == ["step-000000000010", "step-000000000020"]
    base = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=16)
    )
    loaded = peft.PeftModel.from_pretrained(base, folders[-1])
    stored = dcpsvc.storage_reader(tmp_path / "pieces" / "run").layout.tensors
    moved = [p for name, p in loaded.named_parameters() if "lora_B" in name]
    assert moved
    assert all(torch.count_nonzero(p) for p in moved)
    assert all("lora" in name for name in stored if name.startswith("model."))
