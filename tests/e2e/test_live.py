"""``dcpsvc status``, ``save`` and ``stop`` as a user runs them beside torchrun."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import dcpsvc
from tests.e2e.jobs import BOUND_S, live_job


def call(*arguments):
    command = [sys.executable, "-m", "dcpsvc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False)


def document(*arguments):
    done = call(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def has_stepped(root):
    done = call("status", root, "--json")
    return done.returncode == 0 and json.loads(done.stdout)[0]["step"] is not None


@pytest.fixture
def job(tmp_path):
    """A job that saves only when it is asked to."""
    with live_job(tmp_path, has_stepped, saves=False) as process:
        yield tmp_path / "run", process


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
