"""``dcpsvc status``, ``save`` and ``stop`` as a user runs them beside torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

import dcpsvc

BOUND_S = 60
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")

SCRIPT = """
import sys, time
import torch
import torch.distributed as dist
import dcpsvc

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters())
with dcpsvc.Checkpointer(sys.argv[1], {"model": model, "optim": optimizer}, local=sys.argv[1] + "-local") as ckpt:
    for step in range(ckpt.resume() + 1, 10**9):  # until it is stopped
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.02)
        if ckpt.step(step).should_stop:
            break
dist.destroy_process_group()
"""


def call(*arguments):
    command = [sys.executable, "-m", "dcpsvc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False)


def document(*arguments):
    done = call(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of two ranks that has made its first step."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    (tmp_path / "train.py").write_text(SCRIPT)
    root = tmp_path / "run"
    command = [*TORCHRUN, "--nproc-per-node=2", str(tmp_path / "train.py"), str(root)]
    with (
        (tmp_path / "output").open("w+b") as output,
        subprocess.Popen(command, stdout=output, stderr=output) as process,
    ):
        try:
            deadline = time.monotonic() + BOUND_S
            while (done := call("status", root, "--json")).returncode or json.loads(done.stdout)[0]["step"] is None:
                assert process.poll() is None, (tmp_path / "output").read_text()
                assert time.monotonic() < deadline, done.stderr
                time.sleep(0.1)
            yield root, process
        finally:
            process.terminate()
            process.wait(BOUND_S)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_job_is_looked_at_saved_and_stopped_from_another_shell(job):
    root, process = job

    before = document("status", root)
    saved = document("save", root, "--timeout=60")
    after = document("status", root)
    table = call("status", root).stdout
    stopped = call("stop", root)

    assert [rank["rank"] for rank in before] == [0, 1]
    assert [rank["newest"] for rank in before] == [None, None]
    assert saved["state"] == "committed"
    assert saved["step"] > before[0]["step"]
    assert [rank["newest"] for rank in after] == [saved["step"]] * 2
    assert [rank["committed"] for rank in after] == [1, 1]
    assert table.splitlines()[0].startswith(f"{root}  world size 2  ")
    assert table.splitlines()[1].split()[:4] == ["rank", "pid", "step", "newest"]
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["0", "1"]
    assert stopped.returncode == 0, stopped.stderr
    assert "committed" in stopped.stdout
    assert process.wait(BOUND_S) == 0
    newest = dcpsvc.latest(root)
    assert newest is not None
    assert newest.step > saved["step"]
    assert f"step {newest.step} (attempt {newest.attempt}): committed" in stopped.stdout
    gone = call("save", root)
    assert gone.returncode == 4
    assert "no live job of this run" in gone.stderr


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_job_that_is_stopped_without_a_save_leaves_the_last_commit_as_it_is(job):
    root, process = job
    saved = document("save", root)

    stopped = document("stop", root, "--no-save")

    assert stopped["state"] == "stopped"
    assert stopped["step"] > saved["step"]
    assert process.wait(BOUND_S) == 0
    newest = dcpsvc.latest(root)
    assert newest is not None
    assert newest.step == saved["step"]


@pytest.mark.parametrize("command", ["status", "save", "stop"])
def test_without_a_live_job_the_exit_code_is_4_and_without_a_run_3(tmp_path, command):
    (tmp_path / "run.json").write_text('{"format": 1, "run_id": "a", "created": "now"}')

    no_job, no_run = call(command, tmp_path), call(command, tmp_path / "nowhere")

    assert (no_job.returncode, no_run.returncode) == (4, 3)
    assert "no live job of this run on" in no_job.stderr
    assert "Ask on a host of the job" in no_job.stderr
    assert "run.json is missing" in no_run.stderr


def test_a_stop_is_with_a_save_or_without_or_an_abort(tmp_path):
    done = call("stop", tmp_path, "--no-save", "--abort")

    assert done.returncode == 2
    assert "give one of --no-save and --abort" in done.stderr


def test_the_help_tells_the_exit_codes():
    said = " ".join(call("--help").stdout.split())

    assert "4 no live job of this run on this host" in said
