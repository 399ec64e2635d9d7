"""R20: a live job acts on a command from another process within one step, and answers after the commit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from dcpsvc.errors import SaveError
from dcpsvc.tools import live
from tests.ranks.harness import run_ranks, values
from tests.ranks.models import Training, checkpointer, committed

BOUND_S = 40.0
STEP_S = 1.0
"""Longer than the ranks take to agree: then what is asked during a step is done at its end."""


def dcpsvc(*arguments):
    """The command line, in a process of its own."""
    command = [sys.executable, "-m", "dcpsvc", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(client):
    """Exit code, the JSON document it printed, and its errors."""
    output, errors = client.communicate(timeout=BOUND_S)
    return client.returncode, json.loads(output) if output else None, errors


def train_two_steps(training, ckpt):
    """What the ranks know of the pace is that a step takes a second."""
    for step in (1, 2):
        training.step()
        time.sleep(STEP_S)
        assert not ckpt.step(step).saved


def await_agreement(ckpt):
    """Makes a step as long as it takes the ranks to agree, on however busy a machine."""
    deadline = time.monotonic() + BOUND_S
    while ckpt._steering.agreed is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


class HeldUpload:
    """An observer that keeps a rank's upload from being acknowledged until somebody lets go."""

    def __init__(self, root, rank):
        self._flag, self._rank = Path(root).with_name("let-go"), rank
        self.reached = threading.Event()

    def __call__(self, event):
        if event.name == "uploaded" and event.rank == self._rank:
            self.reached.set()
            deadline = time.monotonic() + BOUND_S
            while not self._flag.exists() and time.monotonic() < deadline:
                time.sleep(0.02)

    def let_go(self):
        self._flag.touch()


def save_during_step_3(rank, world, root):
    """Rank 0 starts the command while step 3 is under way, and looks whether it answers before the commit."""
    training, held = Training("ddp", rank), HeldUpload(root, 1)
    told = {}
    with checkpointer(root, training.state, save_last=False, on_event=held) as ckpt:
        train_two_steps(training, ckpt)
        client = dcpsvc("save", root, "--json") if rank == 0 else None
        await_agreement(ckpt)
        training.step()
        outcome = ckpt.step(3)
        dist.barrier()
        if client is not None:
            with pytest.raises(subprocess.TimeoutExpired):
                client.wait(1.0)
            told["before"] = committed(root)
            held.let_go()
            told["answer"] = finished(client)
            told["after"] = committed(root)
        outcome.pending.wait(BOUND_S)
        training.step()
        told["next"] = ckpt.step(4).saved
    return outcome.step, outcome.saved, outcome.should_stop, outcome.pending.attempt, told


def test_a_save_from_another_process_is_made_at_the_end_of_the_step_and_answered_after_the_commit(tmp_path):
    outcomes = values(run_ranks(2, save_during_step_3, str(tmp_path / "root")))

    assert [outcome[:3] for outcome in outcomes] == [(3, True, False)] * 2
    attempt, told = outcomes[0][3:]
    code, answer, errors = told["answer"]
    assert (code, answer) == (0, {"step": 3, "attempt": attempt, "state": "committed"})
    assert "all ranks act after step 3" in errors
    assert (told["before"], told["after"]) == ([], [3])
    assert [outcome[4]["next"] for outcome in outcomes] == [False, False]


def stop_during_step_3(rank, world, root, arguments):
    """Rank 0 starts the command while step 3 is under way."""
    training = Training("ddp", rank)
    with checkpointer(root, training.state) as ckpt:
        train_two_steps(training, ckpt)
        client = dcpsvc("stop", root, "--json", *arguments) if rank == 0 else None
        await_agreement(ckpt)
        training.step()
        outcome = ckpt.step(3)
        told = (outcome.step, outcome.saved, outcome.should_stop)
    return told, None if client is None else finished(client)


@pytest.mark.parametrize(
    ("arguments", "saved", "state"),
    [((), True, "committed"), (("--no-save",), False, "stopped"), (("--abort",), False, "stopped")],
)
def test_a_stop_from_another_process_ends_all_ranks_after_the_step(tmp_path, arguments, saved, state):
    root = tmp_path / "root"

    (first, answered), (second, _) = values(run_ranks(2, stop_during_step_3, str(root), arguments))

    assert first == second == (3, saved, True)
    code, answer, _ = answered
    assert (code, answer["step"], answer["state"]) == (0, 3, state)
    assert committed(root) == ([3] if saved else [])


def abort_during_an_upload(rank, world, root):
    """The save of step 2 hangs in rank 1's upload when the job is to be given up."""
    training, held = Training("ddp", rank), HeldUpload(root, 1)
    with checkpointer(root, training.state, on_event=held) as ckpt:
        train_two_steps(training, ckpt)
        pending = ckpt.save(2)
        if rank == 1:
            assert held.reached.wait(BOUND_S)
        dist.barrier()
        client = dcpsvc("stop", root, "--abort", "--json") if rank == 0 else None
        await_agreement(ckpt)
        training.step()
        should_stop = ckpt.step(3).should_stop
        threading.Timer(1.0, held.let_go).start()
    with pytest.raises(SaveError):
        pending.wait(BOUND_S)
    return should_stop, None if client is None else finished(client)


def test_an_abort_gives_up_what_is_in_flight_on_every_rank(tmp_path):
    root = tmp_path / "root"

    outcomes = values(run_ranks(2, abort_during_an_upload, str(root)))

    assert [outcome[0] for outcome in outcomes] == [True, True]
    assert outcomes[0][1][:2] == (0, {"step": 3, "attempt": "", "state": "stopped"})
    assert committed(root) == []


class Spoiled:
    """State that cannot be had on one rank."""

    def __init__(self, rank):
        self._rank = rank

    def state_dict(self):
        if self._rank == 1:
            raise OSError("the loader is gone")
        return {"position": 1}

    def load_state_dict(self, state):
        raise NotImplementedError


def save_that_fails(rank, world, root):
    training = Training("ddp", rank)
    state = training.state | {"spoiled": Spoiled(rank)}
    told = None
    failed = pytest.raises(SaveError, match="the loader is gone")  # by close(): nobody has raised it before
    with failed, checkpointer(root, state, save_last=False) as ckpt:
        train_two_steps(training, ckpt)
        client = dcpsvc("save", root) if rank == 0 else None
        await_agreement(ckpt)
        training.step()
        ckpt.step(3)
        if client is not None:
            told = (*client.communicate(timeout=BOUND_S), client.returncode)
    return told


def test_a_save_that_fails_is_answered_with_its_error_and_exit_code_1(tmp_path):
    (_, errors, code), _ = values(run_ranks(2, save_that_fails, str(tmp_path / "root")))

    assert code == 1
    assert re.search(
        r"SaveFailedError: step 3 \(attempt .+\): rank 1 failed in stage: OSError: the loader is gone", errors
    )


def ask_rank_1(rank, world, root):
    """The coordinator is on another host: only rank 1 can be asked."""
    training = Training("ddp", rank)
    answer = None
    with checkpointer(root, training.state, save_last=False) as ckpt:
        train_two_steps(training, ckpt)
        dist.barrier()
        statuses = [one.document() for one in live.ranks(live.run_id(root))] if rank == 0 else []
        answers = []
        if rank == 0:
            last = live.ranks(live.run_id(root))[-1]
            thread = threading.Thread(
                target=lambda: answers.append((last.rank, live.command(last, {"command": "save"}, BOUND_S)))
            )
            thread.start()
        await_agreement(ckpt)
        training.step()
        ckpt.step(3)
        if rank == 0:
            thread.join(BOUND_S)
            (answer,) = answers
        dist.barrier()
    return statuses, answer, left_of(root) if rank == 0 else []


def left_of(root):
    """Who can be asked after the other rank has had time to end, too."""
    ends = time.monotonic() + BOUND_S
    while (left := live.ranks(live.run_id(root))) and time.monotonic() < ends:
        time.sleep(0.05)
    return left


def test_every_rank_can_be_asked_and_says_how_it_is_doing(tmp_path):
    root = tmp_path / "root"

    (statuses, answer, left), _ = values(run_ranks(2, ask_rank_1, str(root)))

    assert [status["rank"] for status in statuses] == [0, 1]
    assert [status["step"] for status in statuses] == [2, 2]
    assert [status["world_size"] for status in statuses] == [2, 2]
    assert {status["root"] for status in statuses} == {str(root)}
    assert [(status["committed"], status["failed"], status["skipped"]) for status in statuses] == [(0, 0, 0)] * 2
    assert [status["in_flight"] for status in statuses] == [[], []]
    assert (answer[0], answer[1]["step"], answer[1]["state"]) == (1, 3, "committed")
    assert left == []
