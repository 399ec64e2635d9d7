"""Children that training forks: they end without closing their parent's Checkpointer, and keep nothing of its."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

import dcpsvc
from tests.ranks.harness import run_ranks, values
from tests.ranks.models import Training, checkpointer, committed, step_files

BOUND_S = 40.0


def allow_children():
    """Ranks of the harness are daemons, which may have no children of their own."""
    multiprocessing.current_process()._config["daemon"] = False


# --- children that end ------------------------------------------------------------------------------


def end_as_an_interpreter_does():
    """In a forked child: what runs at the end of a Python process, then the end."""
    try:
        threading._shutdown()
    finally:
        os._exit(0)


def fork_between_steps(rank, world, root, how):
    """Step 1 is noted, a child comes and goes, training goes on."""
    allow_children()
    training = Training("ddp" if world > 1 else "plain", rank)
    with checkpointer(root, training.state) as ckpt:
        training.step()
        ckpt.step(1)
        ended = end_a_child(how, ckpt)
        after_child = committed(root)
        training.step()
        ckpt.save(2).wait(BOUND_S)
        training.step()
        ckpt.step(3)
        print_of_3 = training.fingerprint()
    return ended, after_child, print_of_3


def end_a_child(how, ckpt):
    """Exit code of a child; None if it had to be killed."""
    if how == "os.fork":
        if (child := os.fork()) == 0:
            end_as_an_interpreter_does()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if how == "leaves the with block":
        if (child := os.fork()) == 0:
            with contextlib.suppress(BaseException), ckpt:
                raise ZeroDivisionError
            end_as_an_interpreter_does()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join(BOUND_S)
    code = child.exitcode
    child.kill()
    return code


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("how", ["os.fork", "leaves the with block", "multiprocessing"])
def test_a_forked_child_ends_without_closing_its_parents_checkpointer(tmp_path, world, how):
    root = tmp_path / "run"
    results = values(run_ranks(world if world > 1 else 0, fork_between_steps, root, how))

    assert [(code, steps) for code, steps, _ in results] == [(0, [])] * world
    assert committed(root) == [2, 3]
    assert len(step_files(root, 3)) == 1 + world
    assert values(run_ranks(world if world > 1 else 0, resumed_print, root)) == [(3, each) for _, _, each in results]


def resumed_print(rank, world, root):
    training = Training("ddp" if world > 1 else "plain", rank, seed=1)
    with checkpointer(root, training.state, save_last=False) as ckpt:
        return ckpt.resume(), training.fingerprint()


# --- data loader workers ----------------------------------------------------------------------------


def train_with_workers(rank, world, root):
    """Three epochs with fork workers, a save in the middle of each and one at its end; the last step at the close."""
    allow_children()
    training = Training("ddp", rank)
    data = TensorDataset(torch.arange(8.0))
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
    step = 0
    with checkpointer(root, training.state, every=dcpsvc.Every(steps=2)) as ckpt:
        for _ in range(3):
            for _ in loader:
                step += 1
                training.step()
                ckpt.step(step)
        for _ in loader:  # its workers are ended in the middle of their work
            break
        training.step()
        ckpt.step(step + 1)
        return training.fingerprint()


def test_training_and_saves_go_on_while_data_loader_workers_come_and_go(tmp_path):
    root = tmp_path / "run"
    results = values(run_ranks(2, train_with_workers, root, timeout_s=100))

    assert committed(root) == [2, 4, 6, 8, 10, 12, 13]
    assert [found.state for found in dcpsvc.list_checkpoints(root)] == ["committed"] * 7
    assert values(run_ranks(2, resumed_print, root)) == [(13, final) for final in results]


# --- children that outlive their parent -------------------------------------------------------------

SCRIPT = """
    import os, signal, sys
    import torch
    import dcpsvc

    root, ending = sys.argv[1:]
    ckpt = dcpsvc.Checkpointer(root, {"x": torch.ones(2)}, stop_signals=())
    ckpt.save(1).wait(60)
    ckpt.step(2)
    if (child := os.fork()) == 0:
        signal.alarm(120)
        signal.pause()
    print(child, flush=True)
    os.kill(os.getpid(), getattr(signal, ending))
"""


@pytest.mark.parametrize("ending", ["SIGKILL", "SIGTERM"])
def test_after_a_kill_a_live_forked_child_does_not_keep_the_place_of_its_parent(tmp_path, ending):
    script, root = tmp_path / "train.py", tmp_path / "run"
    script.write_text(textwrap.dedent(SCRIPT))
    output = tmp_path / "output"
    with output.open("wb") as file:
        finished = subprocess.run(
            [sys.executable, str(script), str(root), ending],
            env=os.environ | {"DCPSVC_LOCAL": str(tmp_path / "local")},
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=100,
            check=False,
        )
    assert finished.returncode == -getattr(signal, ending), output.read_text()
    child = int(output.read_text().splitlines()[-1])
    try:
        with dcpsvc.Checkpointer(root, {"x": torch.zeros(2)}, local=tmp_path / "local", save_last=False) as ckpt:
            assert ckpt.resume() == 1
            ckpt.save(2).wait(BOUND_S)
        os.kill(child, 0)  # it was there all the time
    finally:
        os.kill(child, signal.SIGKILL)
    assert committed(root) == [1, 2]


def save_and_be_killed_beside_a_child(rank, world, root, notes):
    training = Training("ddp", rank)
    ckpt = checkpointer(root, training.state)
    ckpt.save(1).wait(BOUND_S)
    dist.barrier()
    ckpt.save(2)
    if (child := os.fork()) == 0:
        close_all_but_locks()
        signal.alarm(120)
        signal.pause()
    (notes / f"rank-{rank}").write_text(str(child))
    os.kill(os.getpid(), signal.SIGKILL)


def close_all_but_locks():
    """The harness takes a rank for alive while a pipe of it is open somewhere."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if link.readlink().suffix != ".lock":
                os.close(int(link.name))


def test_a_job_that_was_killed_beside_live_children_restarts_at_once(tmp_path):
    root = tmp_path / "run"
    outcomes = run_ranks(2, save_and_be_killed_beside_a_child, root, tmp_path)
    assert [outcome.signal for outcome in outcomes] == [signal.SIGKILL] * 2
    children = [int((tmp_path / f"rank-{rank}").read_text()) for rank in range(2)]
    try:
        ((first, _), (second, _)) = values(run_ranks(2, resumed_print, root))
        for child in children:
            os.kill(child, 0)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
    assert first == second
    assert first in {1, 2}
