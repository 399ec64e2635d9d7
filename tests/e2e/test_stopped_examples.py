"""R18: what Slurm and Kubernetes do to the jobs of examples/, done to a real torchrun: the newest step is committed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import torch

import dcpsvc
from tests.e2e.jobs import BOUND_S, ENVIRONMENT, processes_of
from tests.unit.test_recipes import BATCH, CONTAINER, POD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

BUCKET = "s3://bucket"
TRAIN = """
import argparse, hashlib, os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset
import dcpsvc

parser = argparse.ArgumentParser()
parser.add_argument("--root")
parser.add_argument("--stop-file")
parser.add_argument("--grace-s", type=float)
told = parser.parse_args()
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(16, 16))
optimizer = torch.optim.AdamW(model.parameters())
data = TensorDataset(torch.randn(100_000, 16))
workers = {"num_workers": 2, "multiprocessing_context": "fork"} if os.environ["WORKERS"] else {}
if os.environ["WORKERS"] == "apart":
    workers["worker_init_fn"] = lambda _: os.setpgrp()
batches = DataLoader(data, batch_size=4, **workers)
state = {"model": model, "optim": optimizer}
ckpt = dcpsvc.Checkpointer(told.root, state, stop_file=told.stop_file, grace_s=told.grace_s)
with Path(f"steps-{rank}").open("a", buffering=1) as steps, ckpt:
    for step, (batch,) in zip(range(ckpt.resume() + 1, 10**9), batches):
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        content = model.module.weight.detach().numpy().tobytes()
        steps.write(f"{step} {hashlib.sha256(content).hexdigest()}\\n")
        time.sleep(0.02)
        if ckpt.step(step).should_stop:
            break
Path(f"ended-{rank}").write_text(str(ckpt.exit_code))
sys.exit(ckpt.exit_code)
"""
SRUN = """#!/bin/bash
echo $$ >srun.pid
while [ "$1" != torchrun ]; do shift; done
shift
exec "$PYTHON" -m torch.distributed.run --local-addr 127.0.0.1 "$@"
"""
SCONTROL = '#!/bin/bash\n[ "$1" = show ] && echo 127.0.0.1\necho "$@" >>scontrol.log\n'


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where a job runs; who is left of it is ended."""
    (tmp_path / "train.py").write_text(TRAIN)
    yield tmp_path
    for pid in processes_of(tmp_path):  # of a test that has failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    """Of those that the batch script takes."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as tried:
            tried.bind(("127.0.0.1", random.randrange(20_000, 30_000)))
            return int(tried.getsockname()[1])


@contextlib.contextmanager
def started(place: Path, command: list[str], **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A job, once each rank has taken some steps."""
    environment = os.environ | ENVIRONMENT | {"WORKERS": ""} | more
    with (
        (place / "output").open("w+b") as output,
        subprocess.Popen(command, cwd=place, stdout=output, stderr=output, env=environment) as job,
    ):
        try:
            until(place, job, lambda: all(len(steps(place, rank)) >= 5 for rank in range(2)))
            yield job
        finally:
            job.kill()


def until(place: Path, job: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not ready():
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(0.05)
        assert job.returncode is None, (place / "output").read_text()
        assert time.monotonic() < deadline, (place / "output").read_text()


def steps(place: Path, rank: int) -> list[str]:
    """Those a rank has taken, each with a hash of what it had then."""
    path = place / f"steps-{rank}"
    return path.read_text().splitlines() if path.exists() else []


def check(place: Path) -> None:
    """The newest commit is the newest step that any rank has taken, as it was."""
    root = place / "runs" / "exp42"
    loaded = torch.nn.Linear(16, 16)
    step = dcpsvc.load(root, {"model": loaded})
    had = hashlib.sha256(loaded.weight.detach().numpy().tobytes()).hexdigest()
    output = (place / "output").read_text()
    assert [steps(place, rank)[-1] for rank in range(2)] == [f"{step} {had}"] * 2, output


def exit_codes(place: Path) -> list[str]:
    """Of the ranks."""
    return [(place / f"ended-{rank}").read_text() for rank in range(2)]


@contextlib.contextmanager
def batch(place: Path, workers: str) -> Iterator[subprocess.Popen[bytes]]:
    """The batch script on one node with two GPUs, where Slurm's own commands are the smallest that will do.

    Args:
        place: Its working directory.
        workers: Of the ranks' data loaders: none, in the process groups of their ranks, or in their own.
    """
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    (place / "train.sbatch").write_text(BATCH.read_text().replace(BUCKET, str(place)))
    given = {
        "PATH": f"{place}:{os.environ['PATH']}", "PYTHON": sys.executable, "USER": "me", "NVME": str(place / "nvme"),
        "SLURM_JOB_ID": str(free_port()), "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "here",
        "WORKERS": workers,
    }  # fmt: skip
    with started(place, ["/bin/bash", "train.sbatch"], **given) as job:
        yield job


@pytest.mark.parametrize("workers", ["", "together"])
def test_the_signal_that_the_batch_script_asks_for_has_the_newest_step_committed_and_the_job_queued_again(
    place: Path, workers: str
) -> None:
    asked = re.search(r"^#SBATCH --signal=(B:)?(\w+)@\d+$", BATCH.read_text(), re.MULTILINE)
    assert asked
    with batch(place, workers) as job:
        hears = job.pid if asked[1] else int((place / "srun.pid").read_text())  # Slurm's tasks, and not their children
        os.kill(hears, signal.Signals[f"SIG{asked[2]}"])
        assert job.wait(BOUND_S) == 1, (place / "output").read_text()
    check(place)
    assert exit_codes(place) == ["75", "75"]
    assert "requeue" in (place / "scontrol.log").read_text()
    assert processes_of(place) == []


@pytest.mark.parametrize("workers", ["", "apart"])
def test_a_preemption_which_signals_torchrun_has_the_newest_step_committed_and_the_job_queued_again(
    place: Path, workers: str
) -> None:
    with batch(place, workers) as job:
        os.kill(int((place / "srun.pid").read_text()), signal.SIGTERM)
        assert job.wait(BOUND_S) == 1, (place / "output").read_text()
    check(place)
    assert exit_codes(place) == ["75", "75"]
    assert "requeue" in (place / "scontrol.log").read_text()


@pytest.mark.parametrize("hook", [True, False])
def test_a_pod_that_is_told_to_end_has_its_newest_step_committed_within_its_grace(place: Path, *, hook: bool) -> None:
    here = {"--nnodes": "1", "--nproc-per-node": "2", "--rdzv-endpoint": f"127.0.0.1:{free_port()}"}
    told = [argument.replace(BUCKET, str(place)).split("=", 1) for argument in CONTAINER["args"]]
    arguments = ["=".join([name, here.get(name, *value)] if value else [name]) for name, *value in told]
    command = [sys.executable, "-m", "torch.distributed.run", "--local-addr", "127.0.0.1", *arguments]
    given = {one["name"]: one["value"] for one in CONTAINER["env"]} | {"DCPSVC_LOCAL": str(place / "nvme")}
    ask = [word.replace(BUCKET, str(place)) for word in CONTAINER["lifecycle"]["preStop"]["exec"]["command"]]
    with started(place, command, **given) as pod:
        ends = time.monotonic() + POD["terminationGracePeriodSeconds"]
        if hook:
            subprocess.run([sys.executable, "-m", *ask], check=True, timeout=BOUND_S, capture_output=True)
        pod.terminate()
        assert pod.wait(ends - time.monotonic()) == 1, (place / "output").read_text()
    check(place)
    assert exit_codes(place) == ["75", "75"]
    assert processes_of(place) == []
