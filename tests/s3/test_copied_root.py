"""R15: a run that was on a disk goes on where ``dcpsvc cp`` brought it on S3: nothing that counted there is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import torch

import dcpsvc
from dcpsvc import Best, Latest, Pinned

if TYPE_CHECKING:
    from pathlib import Path

    from tests.s3.servers import Server

KEEP = Latest(1) | Best(2, "loss", mode="min") | Pinned()
LOSSES = {1: 0.5, 2: 0.1, 3: 0.9, 4: 0.2, 5: 0.7}


def state_at(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.randn(300_000, generator=generator), "step": step}


def committed(root: str | Path, **more: Any) -> dict[int, list[str]]:
    """Steps, and why each is kept."""
    argv = [sys.executable, "-m", "dcpsvc", "ls", str(root), "--json", *more.get("argv", [])]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=True)
    return {one["step"]: one["reasons"] for one in json.loads(done.stdout) if one["state"] == "committed"}


def test_a_root_on_a_disk_is_copied_to_s3_and_the_run_goes_on_there_with_its_best_ones_and_its_pins(
    s3_server: Server, run_root: str, tmp_path: Path
) -> None:
    disk, options = tmp_path / "root", s3_server.storage_options
    argv = [
        part for name, value in options.items()
        for part in ("-o", f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    ]  # fmt: skip
    state = state_at(0)
    with dcpsvc.Checkpointer(disk, state, local=tmp_path / "a", keep=KEEP, save_last=False) as ckpt:
        for step, loss in LOSSES.items():
            state.update(state_at(step))
            ckpt.save(step, metrics={"loss": loss}).wait(60)
            if step == 1:
                dcpsvc.pin(disk, 1, "figure 3")
    here = committed(disk)
    assert here.keys() == {1, 2, 4, 5}
    subprocess.run([sys.executable, "-m", "dcpsvc", "cp", str(disk), run_root, *argv], timeout=200, check=True)
    there = committed(run_root, argv=argv)
    assert there.keys() == here.keys()
    assert there[1] == here[1] == ["pinned: figure 3"]

    resumed = state_at(0)
    with dcpsvc.Checkpointer(
        run_root, resumed, local=tmp_path / "b", keep=KEEP, save_last=False, storage_options=options
    ) as ckpt:
        assert ckpt.resume() == 5
        assert torch.equal(resumed["w"], state_at(5)["w"])
        for step, loss in ((6, 0.15), (7, 0.8)):
            resumed.update(state_at(step))
            ckpt.save(step, metrics={"loss": loss}).wait(60)
    # 5 was resumed from, so its job held it; 4 is no longer among the two best.
    assert committed(run_root, argv=argv).keys() == {1, 2, 5, 6, 7}
    for step in (1, 2, 6, 7):
        loaded = state_at(0)
        assert dcpsvc.load(run_root, loaded, step, storage_options=options) == step
        assert torch.equal(loaded["w"], state_at(step)["w"])
    assert committed(disk) == here, "the original is as it was"
