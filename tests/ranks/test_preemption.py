"""R18, R19: one rank is told to end, at any moment; all stop at one step, save it once, and exit in time."""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

import dcpsvc
from dcpsvc.preemption import EXIT_STOPPED
from dcpsvc.storage.posix import PosixStore
from tests.ranks.harness import run_ranks, values
from tests.ranks.models import SYNC_S, Training, checkpointer, committed, files, step_files

WORLD = 4
BOUND_S = 40.0


class Jammed(PosixStore):
    """Takes no shard as long as a file named ``jam`` lies beside it."""

    def put_file(self, key, path, *, progress=None):
        ends = time.monotonic() + 3 * BOUND_S
        while jam(self.url).exists() and time.monotonic() < ends:
            time.sleep(0.02)
        super().put_file(key, path, progress=progress)


def jam(root):
    return Path(root).parent / "jam"


def open_jammed(root, state, **options):
    """A Checkpointer on a store that jams."""
    return dcpsvc.Checkpointer(Jammed(Path(root)), state, local=Path(root).parent / "local", **options)


def until(condition):
    """Something that other threads bring about; never for ever."""
    ends = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < ends, "it did not come about"
        time.sleep(0.01)


def tell(how, root):
    """End soon: the signal, or the touched file, of the real world."""
    if how == "file":
        stop_file(root).touch()
    else:
        os.kill(os.getpid(), getattr(signal, how))


def stop_file(root):
    """Beside the run root, of this rank alone: as on a disk of its node."""
    return Path(root).parent / f"stop-{os.environ['RANK']}"


# --- told at any moment -----------------------------------------------------------------------------


class Moment:
    """What a rank does in step 5, in which it may be told to end."""

    def __init__(self, ckpt, training, root, tells):
        self.ckpt, self.training, self.root, self.tells = ckpt, training, root, tells

    def agreed(self):
        return self.ckpt._steering.agreed is not None

    def step(self):
        """A step that computes and communicates until all ranks know."""
        threading.Thread(target=self.tells).start()
        everybody, a = torch.zeros(()), torch.rand(256, 256)
        while everybody.item() < dist.get_world_size():
            a = torch.softmax(a @ a, dim=0)
            everybody = torch.tensor(float(self.agreed()))
            dist.all_reduce(everybody)

    def save(self):
        """A save that the store does not take until all ranks know."""
        pending = self.ckpt.save(5)
        until(pending.local.done)
        self.tells()
        until(self.agreed)
        assert not pending.committed.done()
        dist.barrier()

    def evaluation(self):
        """A long time without a step, on each rank by itself, until it knows."""
        self.tells()
        with torch.no_grad():
            until(lambda: self.training.core.eval()(torch.rand(4, 8)).isfinite().all() and self.agreed())
        self.training.core.train()


def train_until_told(rank, world, root, victim, how, when):  # noqa: PLR0917
    training = Training("ddp", rank)
    jam(root).touch()
    dist.barrier()
    ckpt = open_jammed(root, training.state, sync_timeout_s=SYNC_S, stop_file=stop_file(root), save_last=False)
    moment = Moment(ckpt, training, root, lambda: tell(how, root) if rank == victim else None)
    stopped = None
    with ckpt:
        for step in itertools.count(1):
            training.step()
            if step == 5:
                getattr(moment, when)()
                jam(root).unlink(missing_ok=True)
            if ckpt.step(step).should_stop:
                stopped = step
                break
    return stopped, ckpt.exit_code, ckpt._steering._preemption.requested, training.fingerprint()


MOMENTS = [
    (victim, how, when)
    for victim, (how, when) in zip(
        itertools.cycle(range(WORLD)),
        itertools.product(["SIGTERM", "SIGUSR1", "file"], ["step", "save", "evaluation"]),
        strict=False,
    )
]


@pytest.mark.parametrize(("victim", "how", "when"), MOMENTS)
def test_when_one_rank_is_told_to_end_all_stop_at_one_step_that_is_saved_once(tmp_path, victim, how, when):
    root = tmp_path / "run"
    results = values(run_ranks(WORLD, train_until_told, root, victim, how, when))

    ((stopped, code, why),) = {result[:3] for result in results}
    assert stopped >= 5
    assert code == EXIT_STOPPED
    assert why == (f"trigger file {tmp_path / f'stop-{victim}'}" if how == "file" else f"{how} on rank {victim}")
    assert committed(root) == ([5] if when == "save" and stopped != 5 else []) + [stopped]
    assert len([name for name in files(root) if name.startswith("manifests/order-")]) == len(committed(root))
    assert len([name for name in step_files(root, stopped) if name.endswith(".safetensors")]) == WORLD
    assert values(run_ranks(WORLD, resumed, root)) == [(stopped, final) for _, _, _, final in results]


def resumed(rank, world, root):
    training = Training("ddp" if world > 1 else "plain", rank, seed=1)
    with checkpointer(root, training.state, save_last=False) as ckpt:
        return ckpt.resume(), training.fingerprint()


def end_as_planned(rank, world, root):
    training = Training("ddp", rank)
    with checkpointer(root, training.state) as ckpt:
        for step in range(1, 4):
            training.step()
            assert not ckpt.step(step).should_stop
    return ckpt.exit_code


def test_a_job_that_comes_to_its_end_exits_with_0(tmp_path):
    assert values(run_ranks(2, end_as_planned, tmp_path / "run")) == [0, 0]


def ask_to_stop_on_a_slow_store(rank, world, root):
    training = Training("ddp", rank)
    ckpt = open_jammed(root, training.state, sync_timeout_s=SYNC_S, grace_s=0.5)
    jam(root).touch()
    with ckpt:
        for step in itertools.count(1):
            training.step()
            if step == 3 and rank == 1:
                ckpt.request_stop()
            if ckpt.step(step).should_stop:
                break
        until(lambda: ckpt._steering.agreed is not None)
        dist.barrier()
        threading.Timer(3.0, jam(root).unlink, [True]).start()  # long after the grace
    return step, ckpt.exit_code


def test_a_stop_that_nobody_hurries_waits_for_its_upload(tmp_path):
    root = tmp_path / "run"
    ((step, code),) = set(values(run_ranks(2, ask_to_stop_on_a_slow_store, root)))

    assert committed(root) == [step]
    assert code == EXIT_STOPPED


# --- less time than the upload takes ----------------------------------------------------------------

GRACE_S = 3.0


def be_cut_short(rank, world, root, victim):
    """Step 2 is committed; then the store takes nothing more, and one rank is told to end."""
    training = Training("ddp", rank)
    with open_jammed(root, training.state, sync_timeout_s=SYNC_S, grace_s=GRACE_S) as ckpt:
        for step in itertools.count(1):
            training.step()
            outcome = ckpt.step(step)
            if step == 2:
                ckpt.save(2).wait(BOUND_S)
                dist.barrier()
                jam(root).touch()
                if rank == victim:
                    tell("SIGTERM", root)
                    told_s = time.monotonic()
            if outcome.should_stop:
                break
    took_s = time.monotonic() - told_s if rank == victim else 0.0
    return outcome.step, outcome.pending.attempt, took_s, ckpt.exit_code, training.fingerprint()


def cut_short(tmp_path, world, victim):
    """Attempt, and what each rank trained, of a job that had to end before its upload had."""
    root = tmp_path / "run"
    results = values(run_ranks(world, be_cut_short, root, victim))
    ((step, attempt, code),) = {(step, attempt, code) for step, attempt, _, code, _ in results}
    assert jam(root).exists()
    assert code == EXIT_STOPPED
    assert max(took_s for _, _, took_s, _, _ in results) < GRACE_S + 15.0
    assert committed(root) == [2]
    assert [name for name in step_files(tmp_path / "local", step) if "manifests/" in name]
    jam(root).unlink()
    return step, attempt, [(step, final) for *_, final in results]


@pytest.mark.parametrize("victim", [0, 1])
def test_an_upload_that_the_grace_cut_short_is_finished_by_the_next_start_as_the_same_attempt(tmp_path, victim):
    root = tmp_path / "run"
    step, attempt, trained = cut_short(tmp_path, 2, victim)

    assert values(run_ranks(2, resumed, root)) == trained
    assert committed(root) == [2, step]
    (manifest,) = [name for name in step_files(root, step) if name.startswith("manifests/")]
    assert f".{attempt}." in manifest


def test_on_an_empty_disk_the_job_resumes_from_the_commit_before(tmp_path):
    cut_short(tmp_path, 2, 1)
    shutil.rmtree(tmp_path / "local")

    assert [step for step, _ in values(run_ranks(2, resumed, tmp_path / "run"))] == [2, 2]
    assert committed(tmp_path / "run") == [2]


def be_told_while_closing(rank, world, root):
    """The training is over; its last upload hangs when the signal comes."""
    training = Training("ddp", rank)
    jam(root).touch()
    dist.barrier()
    ckpt = open_jammed(root, training.state, sync_timeout_s=SYNC_S, grace_s=GRACE_S)
    training.step()
    ckpt.step(1)
    pending = ckpt.save(1)
    until(pending.local.done)
    closing = threading.Event()

    def end() -> None:
        closing.wait(BOUND_S)
        tell("SIGTERM", root)

    threading.Thread(target=end).start()
    closing.set()
    ckpt.close()
    return pending.attempt


def test_a_job_that_is_told_to_end_while_it_closes_leaves_in_time_and_the_next_start_finishes(tmp_path):
    root = tmp_path / "run"
    (attempt,) = set(values(run_ranks(2, be_told_while_closing, root)))
    assert jam(root).exists()
    assert committed(root) == []
    jam(root).unlink()

    assert [step for step, _ in values(run_ranks(2, resumed, root))] == [1, 1]
    assert [name for name in files(root) if f".{attempt}." in name and name.startswith("manifests/")]


# --- the process and its own ways -------------------------------------------------------------------


def train_with_a_handler(rank, world, root):
    heard = []

    def hear(number, _):
        heard.append(number)

    signal.signal(signal.SIGTERM, hear)
    usr1 = signal.getsignal(signal.SIGUSR1)
    training = Training("plain", rank)
    with checkpointer(root, training.state) as ckpt:
        os.kill(os.getpid(), signal.SIGTERM)
        for step in itertools.count(1):
            if ckpt.step(step).should_stop:
                break
    return heard, signal.getsignal(signal.SIGTERM) is hear, signal.getsignal(signal.SIGUSR1) is usr1


def test_a_handler_of_the_users_own_is_called_and_stands_again_after_close(tmp_path):
    assert values(run_ranks(0, train_with_a_handler, tmp_path / "run")) == [([signal.SIGTERM], True, True)]


SCRIPT = """
    import itertools, logging, os, signal, sys, time
    from pathlib import Path
    import torch
    import dcpsvc
    from tests.ranks.test_preemption import open_jammed

    logging.basicConfig(level=logging.INFO)
    signal.alarm(100)
    root = Path(sys.argv[1])
    ckpt = open_jammed(root, {"x": torch.ones(2)}, grace_s=600.0)
    with ckpt:
        for step in itertools.count(1):
            time.sleep(0.01)
            if ckpt.step(step).should_stop:
                print("stopping", step, flush=True)
                break
            if step == 5:
                print("training", flush=True)
    sys.exit(ckpt.exit_code)
"""


@contextlib.contextmanager
def live_job(tmp_path):
    """A script that trains until it is told to end."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    log = (tmp_path / "log").open("wb")
    with log, subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log) as process:
        try:
            assert process.stdout.readline() == b"training\n", (tmp_path / "log").read_text()
            yield process
        finally:
            process.kill()


def test_the_exit_code_of_a_stopped_job_says_try_again(tmp_path):
    with live_job(tmp_path) as job:
        job.terminate()
        word, step = job.stdout.readline().split()
        assert job.wait(BOUND_S) == 75
    assert word == b"stopping"
    assert committed(tmp_path / "run") == [int(step)]
    assert "SIGTERM on rank 0" in (tmp_path / "log").read_text()


def test_a_second_sigterm_ends_a_job_that_is_still_saving(tmp_path):
    with live_job(tmp_path) as job:
        jam(tmp_path / "run").touch()
        job.terminate()
        assert job.stdout.readline().startswith(b"stopping")
        while job.poll() is None:  # the test's own timeout bounds it
            job.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(0.2)
        assert job.returncode == -signal.SIGTERM
    assert committed(tmp_path / "run") == []


def allow_children():
    """Ranks of the harness are daemons, which may have no children of their own."""
    multiprocessing.current_process()._config["daemon"] = False


def train_with_workers(rank, world, root):
    """Workers are ended in the middle of their work, by the loader and by SIGTERM."""
    allow_children()
    training = Training("ddp", rank)
    loader = DataLoader(TensorDataset(torch.arange(8.0)), num_workers=2, multiprocessing_context="fork")
    codes = []
    with checkpointer(root, training.state) as ckpt:
        for step in range(1, 4):
            batches = iter(loader)
            next(batches)
            workers = batches._workers
            if step == 2:
                child = multiprocessing.get_context("fork").Process(target=signal.pause)
                child.start()
                workers = [*workers, child]
                for worker in workers:
                    worker.terminate()
            del batches
            for worker in workers:
                worker.join(BOUND_S)
                codes.append(worker.exitcode)
            training.step()
            assert not ckpt.step(step).should_stop
        until(lambda: ckpt._steering._preemption.wanted() is None)
    return codes, ckpt.exit_code


def test_workers_of_a_data_loader_are_ended_by_sigterm_and_the_job_goes_on(tmp_path):
    root = tmp_path / "run"
    for codes, exit_code in values(run_ranks(2, train_with_workers, root)):
        assert exit_code == 0
        assert codes[4] == -signal.SIGTERM  # the plain child
        assert set(codes) <= {0, -signal.SIGTERM}  # torch's workers exit with 0 when their parent ends them
    assert committed(root) == [3]
