"""``dcpsvc drill sigterm`` on a user's own script: it passes, or says what to change, and leaves no process behind."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time

import pytest

from dcpsvc.tools import processes
from dcpsvc.tools.judging import Course, judge
from tests.e2e.jobs import processes_of

BOUND_S = 170
PATIENT = "--grace=100"
"""On a busy machine the interpreter alone may take half a minute to end."""
DRILL = (sys.executable, "-m", "dcpsvc", "drill", "sigterm")
TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--local-addr",
    "127.0.0.1",
    "--nproc-per-node",
)

SCRIPT = """
import sys, time
import torch
import torch.distributed as dist
import dcpsvc

root, ending = sys.argv[1:]
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters())
print("the script speaks", flush=True)


def hang(event):
    if ending == "hang" and event.name == "acked-local":
        time.sleep(600)


options = {"grace_s": 3.0, "on_event": hang} if ending == "hang" else {}
ckpt = dcpsvc.Checkpointer(root, {"model": model, "optim": optimizer}, local=root + "-local", **options)
with ckpt:
    for step in range(ckpt.resume() + 1, 3000):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.02)
        if ckpt.step(step).should_stop and ending != "never":
            break
if ending == "linger":
    time.sleep(600)
dist.destroy_process_group()
"""


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    yield
    for pid in processes_of(tmp_path):  # of a test that has failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def drill(*arguments, command):
    """Run a drill to its end; returns the finished process and its JSON document."""
    finished = subprocess.run(
        [*DRILL, "--json", *arguments, "--", *command], capture_output=True, text=True, timeout=BOUND_S, check=False
    )
    assert finished.stdout, finished.stderr
    return finished, json.loads(finished.stdout)


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("arguments", "target"), [((), "rank 1"), (("--to=launcher",), "the launcher"), (("--signal=USR1",), "rank 1")]
)
def test_a_loop_that_heeds_should_stop_passes(tmp_path, environment, arguments, target):
    command = (*TORCHRUN, "2", "train.py", "run", "heed")
    finished, seen = drill("--root=run", PATIENT, *arguments, command=command)

    assert finished.returncode == 0, (seen, finished.stderr)
    assert seen["passed"]
    assert seen["findings"] == []
    assert seen["target"].startswith(target)
    assert seen["newest"] >= seen["step_at_signal"] >= 3
    assert seen["committed_s"] <= seen["ended_s"]
    assert "the script speaks" in finished.stderr
    assert processes_of(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_loop_that_ignores_should_stop_fails_with_the_remedy_and_is_ended(tmp_path, environment):
    finished, seen = drill("--grace=10", command=(*TORCHRUN, "2", "train.py", "run", "never"))

    assert finished.returncode == 1, finished.stderr
    assert not seen["passed"]
    assert seen["findings"] == [
        {"problem": "the loop never looked at should_stop", "remedy": "if ckpt.step(step, ...).should_stop: break"}
    ]
    assert seen["last_step"] > seen["stop_step"] >= seen["step_at_signal"]
    assert seen["ended_s"] is None
    assert processes_of(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_job_that_saves_and_then_lingers_fails(tmp_path, environment):
    finished, seen = drill("--grace=10", command=(sys.executable, "-c", ONE, "run", "linger"))

    assert finished.returncode == 1, finished.stderr
    assert "committed, and still running" in seen["findings"][0]["problem"]
    assert processes_of(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_an_upload_that_is_longer_than_the_grace_passes_because_the_next_start_finishes_it(tmp_path, environment):
    finished, seen = drill(PATIENT, command=(sys.executable, "-c", ONE, "run", "hang"))

    assert finished.returncode == 0, (seen, finished.stderr)
    assert seen["newest"] is None
    assert seen["newest_local"] >= seen["step_at_signal"]
    assert seen["committed_s"] is None
    assert seen["local_s"] <= seen["ended_s"]
    assert "it will be finished at the next start on this disk" in seen["note"]


ONE = SCRIPT.replace("dist.init_process_group", "str").replace("dist.destroy_process_group()", "").replace(
    "torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))", "torch.nn.Linear(8, 1)"
)  # fmt: skip
"""The same without a process group."""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_table_says_passed_and_the_script_speaks_to_standard_output(tmp_path, environment):
    command = [*DRILL, PATIENT, "--after-step=1", sys.executable, "-c", ONE, "run", "heed"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False)

    assert finished.returncode == 0, finished.stderr
    assert "the script speaks" in finished.stdout
    assert "SIGTERM to rank 0 (process " in finished.stdout
    assert finished.stdout.splitlines()[-1] == "passed"


def test_a_script_without_a_checkpointer_is_told_so(tmp_path, environment):
    command = (sys.executable, "-c", "print('done')")

    unnamed, seen = drill(command=command)
    named, other = drill("--root=nowhere", command=command)

    assert (unnamed.returncode, named.returncode) == (1, 1)
    assert seen["findings"][0]["problem"] == ("no Checkpointer was found before the command ended with exit code 0")
    assert other["findings"] == [
        {
            "problem": "no Checkpointer of nowhere was found before the command ended with exit code 0",
            "remedy": "is ROOT right?",
        }
    ]


def test_a_command_that_does_not_begin_in_time_is_ended(tmp_path, environment):
    finished, seen = drill("--start=1", command=("sleep", "600"))

    assert finished.returncode == 1
    assert seen["findings"][0]["problem"] == "no Checkpointer was found within 1 s"
    assert processes_of(tmp_path) == []


STRANGER = """
import sys, time
from dcpsvc.control import Control

class Training:
    def status(self): return {"root": sys.argv[2], "step": int(100 * time.monotonic())}

control = Control(sys.argv[1], 0, Training())
print("up", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("named", [True, False])
def test_a_job_that_runs_already_is_never_taken_for_the_commands_own(tmp_path, environment, named):
    run_id = secrets.token_hex(6)
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "run_id": run_id, "created": "now"}))
    command = [sys.executable, "-c", STRANGER, run_id, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as stranger:
        try:
            assert stranger.stdout.readline() == "up\n"
            _, seen = drill(*([f"--root={tmp_path}"] if named else []), "--start=2", command=("sleep", "600"))
            still_running = stranger.poll() is None
        finally:
            stranger.kill()

    assert seen["findings"][0]["problem"].startswith("no Checkpointer ")
    assert seen["target"] == ""
    assert still_running


def test_a_command_that_does_not_exist_is_wrong_usage(environment):
    finished = subprocess.run(
        [*DRILL, "--", "no-such-command"], capture_output=True, text=True, timeout=BOUND_S, check=False
    )

    assert finished.returncode == 2
    assert "no-such-command: No such file or directory" in finished.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_drill_leaves_no_process_behind(tmp_path, environment, signum):
    script = (
        "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True); print('up', flush=True); "
        "subprocess.run(['sleep', '600'])"
    )
    with subprocess.Popen(
        [*DRILL, "--", sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout.readline() == "up\n"
        running.send_signal(signum)
        _, errors = running.communicate(timeout=30)

    assert running.returncode != 0, errors
    assert "Traceback" not in errors
    assert processes_of(tmp_path) == []


# --- the processes of a command ---------------------------------------------------------------------

ORPHANS = """
import os, subprocess, sys, time
if os.fork() == 0:  # in this session, and soon without a parent
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
os.wait()
subprocess.Popen([sys.executable, "-c", "import os, time; os.fork(); time.sleep(600)"], start_new_session=True)
print("up", flush=True)
time.sleep(600)
"""


def test_orphans_and_processes_in_sessions_of_their_own_end_with_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "output").open("w+b") as output:
        with processes.family([sys.executable, "-c", ORPHANS], output) as job:
            deadline = time.monotonic() + 20
            while len(job.look()) < 4:
                assert time.monotonic() < deadline, job.alive
                time.sleep(0.05)
            assert sorted(job.alive) == sorted(processes_of(tmp_path))

        assert job.look() == frozenset()
    assert processes_of(tmp_path) == []
    assert job.launcher.returncode == -signal.SIGKILL


def test_a_process_that_ended_by_itself_keeps_its_exit_code():
    with processes.family([sys.executable, "-c", "raise SystemExit(7)"]) as job:
        deadline = time.monotonic() + 20
        while job.look():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    assert job.launcher.returncode == 7


# --- the verdict ------------------------------------------------------------------------------------


def seen(**what):
    """A job that got SIGTERM after step 40, agreed on step 42, and had 30 s."""
    usual = {"root": "run", "steps": 3, "target": "rank 1 (process 7)", "step_at_signal": 40, "last_step": 42}
    return Course(asked_root=None, wanted_steps=3, waited_s=600, grace_s=30, signal="SIGTERM", **(usual | what))


VERDICTS = {
    "committed and ended": (seen(stop_step=42, newest=42, ended_s=3.0, exit_code=0), True, ""),
    "committed late": (seen(stop_step=42, newest=40, ended_s=3.0), True, ""),
    "killed with the save on the local disks": (
        seen(stop_step=42, newest=20, newest_local=42),
        True,
        "killed after 30 s: upload is longer than the grace: it will be finished at the next start on this disk",
    ),
    "ended with the save on the local disks": (
        seen(stop_step=42, newest=20, newest_local=42, ended_s=24.0, exit_code=0),
        True,
        "ended after 24.0 s: upload is longer than the grace: it will be finished at the next start on this disk",
    ),
    "ignored": (seen(stop_step=42, last_step=90, newest=42), False, "never looked at should_stop"),
    "ignored until the loop was over": (
        seen(stop_step=42, last_step=90, newest=42, ended_s=9.0),
        False,
        "never looked at should_stop",
    ),
    "unnoticed": (seen(newest=20), False, "SIGTERM was not noticed within 30 s"),
    "died of the signal": (
        seen(newest=20, ended_s=1.0, exit_code=1),
        False,
        "SIGTERM ended the job without a save: steps 21 to 42 are lost",
    ),
    "died of the signal before any commit": (seen(ended_s=1.0), False, "steps 1 to 42 are lost"),
    "its save failed": (seen(stop_step=42, newest=20, ended_s=4.0), False, "its save failed: steps 21 to 42 are lost"),
    "killed before the local disk had it": (
        seen(stop_step=42, newest=20, newest_local=20, phase="shard"),
        False,
        "killed after 30 s in shard, before the save was on the local disks: steps 21 to 42 are lost",
    ),
    "committed and lingering": (
        seen(stop_step=42, newest=42),
        False,
        "committed, and still running 30 s after the signal",
    ),
    "too few steps": (seen(target="", exit_code=0), False, "3 of 3 steps were seen before the command ended"),
}


@pytest.mark.parametrize(("course", "passed", "text"), VERDICTS.values(), ids=list(VERDICTS))
def test_the_verdict_on(course, passed, text):
    verdict = judge(course)

    assert verdict.passed == passed
    assert text in (verdict.note if passed else verdict.findings[0].problem)
    assert all(remedy for _, remedy in verdict.findings)
    assert json.loads(json.dumps(verdict.document()))["passed"] == passed
