"""Two jobs on one run root: the one that came last owns it; whatever the other still does, nothing is lost or torn."""

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import dcpsvc
from dcpsvc.errors import DcpsvcError
from dcpsvc.format import keys
from dcpsvc.storage.posix import PosixStore
from tests.ranks.harness import Job, die_at, raised_by, run_jobs, run_ranks, values
from tests.ranks.models import checkpointer, committed, step_files

PATIENT_S, BRIEF_S = 60.0, 2.5
"""For jobs in which nobody is missed, and for those in which somebody shall be."""


class Signs:
    """What jobs that know nothing of each other tell through the file system."""

    def __init__(self, folder):
        self._folder = Path(folder)
        self._folder.mkdir(exist_ok=True)

    def give(self, name, text=""):
        aside = self._folder / f".{name}-{os.getpid()}"
        aside.write_text(text or "-")
        aside.rename(self._folder / name)

    def await_(self, name):
        deadline = time.monotonic() + PATIENT_S
        while not (self._folder / name).exists():
            assert time.monotonic() < deadline, f"nobody gave the sign {name!r}"
            time.sleep(0.005)
        return (self._folder / name).read_text()


def opened(root, local, *, sync_timeout_s=PATIENT_S, store=None, **options):
    """A Checkpointer of a job on a host of its own, and its state."""
    state = {"weights": torch.zeros(3), "trainer": {"steps": 0}}
    ckpt = checkpointer(
        root, state, local=root.parent / local, store=store, sync_timeout_s=sync_timeout_s, save_last=False, **options
    )
    return ckpt, state


def save(ckpt, state, step):
    """Train a step and save it; what the save raises."""
    state["trainer"]["steps"] = step
    state["weights"].fill_(step)
    return raised_by(ckpt.save(step).wait, PATIENT_S)


def resume_anew(rank, world, root, local):
    ckpt, state = opened(root, local)
    with ckpt:
        return ckpt.resume(), state["trainer"]["steps"], state["weights"].tolist()


def save_next(rank, world, root):
    ckpt, state = opened(root, "local-of-the-next")
    with ckpt:
        return save(ckpt, state, ckpt.resume() + 1)


def assert_resumes(root, step):
    """A fresh start on an empty disk continues from a step, with the right values."""
    (found,) = values(run_ranks(0, resume_anew, root, f"fresh-{step}"))
    assert found == (step, step, [float(step)] * 3)


def leave(ckpt):
    """Close; a job that was replaced says so once more."""
    return raised_by(ckpt.close)


# --- a second job -----------------------------------------------------------------------------------


def train_until_replaced(rank, world, root, signs):
    ckpt, state = opened(root, "local-of-the-first")
    first = save(ckpt, state, 1)
    if rank == 0:
        signs.give("saved")
    signs.await_("replaced")
    refused = save(ckpt, state, 2)
    at_once = raised_by(ckpt.step, 3)
    closing = leave(ckpt)
    signs.give(f"refused-{rank}")
    return {"first": first, "refused": refused, "step": at_once, "closing": closing, "pid": os.getpid()}


def take_over(rank, world, root, signs):
    signs.await_("saved")
    ckpt, state = opened(root, "local-of-the-second")
    with ckpt:
        start = ckpt.resume()
        if rank == 0:
            signs.give("replaced")
        for old in range(2):
            signs.await_(f"refused-{old}")
        before = committed(root)
        error = save(ckpt, state, 2) or save(ckpt, state, 3)
    return {"start": start, "before": before, "error": error, "pid": os.getpid()}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_second_job_takes_over_and_the_first_is_refused_on_all_its_ranks_with_an_error_that_names_both(
    tmp_path, world
):
    root, signs = tmp_path / "run", Signs(tmp_path / "signs")
    first, second = run_jobs([Job(2, train_until_replaced, (root, signs)), Job(world, take_over, (root, signs))])
    old, new = values(first), values(second)

    assert [each["first"] for each in old] == [None] * 2
    (text,) = {each["refused"].text for each in old}
    for each in old:
        assert each["refused"].type == each["step"].type == each["closing"].type == "FencedError"
        assert each["step"].text == text
    claims = sorted((root / keys.EPOCHS).glob("*[0-9a-f].json"))
    tokens = [path.name.split(".")[1] for path in claims if "inherited" not in path.name]
    for word in (*tokens, "epoch 1", "epoch 2", os.uname().nodename, f"process {new[0]['pid']}", "step 1 remains"):
        assert word in text, word
    assert [(each["start"], each["before"], each["error"]) for each in new] == [(1, [1], None)] * world
    assert committed(root) == [1, 2, 3]
    assert {found.state for found in dcpsvc.list_checkpoints(root)} == {"committed"}
    assert len(step_files(root, 2)) == world + 1  # the manifest and the shards of the second job: the first left none
    assert_resumes(root, 3)


# --- zombies ----------------------------------------------------------------------------------------


class StopsAt(PosixStore):
    """A run root at which this process is stopped, once, right before a call to the manifest of a step."""

    def __init__(self, root, signs, call, step):
        super().__init__(root)
        self._signs, self._call, self._key = signs, call, keys.Attempt(step, "").manifest[:-5]

    def create(self, key, data):
        self._stop("create", key)
        return super().create(key, data)

    def get(self, key, *, max_nbytes):
        self._stop("get", key)
        return super().get(key, max_nbytes=max_nbytes)

    def stop_at(self, event):
        """An observer: stops at a point of a checkpoint's life instead."""
        if event.step is not None:
            self._stop(event.name, keys.Attempt(event.step, "").manifest[:-5])

    def _stop(self, call, key):
        if call == self._call and key.startswith(self._key):
            self._call = ""
            self._signs.give("stopped", str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
            self._signs.await_("woken")  # the signal stops all threads, but maybe not this one at once


def is_stopped(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def wake(signs):
    """SIGCONT to the zombie, which has been stopped for sure."""
    pid = int(signs.await_("stopped"))
    deadline = time.monotonic() + PATIENT_S
    while not is_stopped(pid):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    signs.give("woken")
    os.kill(pid, signal.SIGCONT)


def be_a_zombie(rank, world, root, signs, how):
    call, sync_timeout_s = how
    store = StopsAt(root, signs, call, 2) if rank == 0 else None
    options = {"on_event": store.stop_at} if store and call == dcpsvc.Point.ACKED_REMOTE else {}
    ckpt, state = opened(root, "local-of-the-zombie", store=store, sync_timeout_s=sync_timeout_s, **options)
    first = save(ckpt, state, 1)
    second = save(ckpt, state, 2)
    signs.give(f"heard-{rank}")
    if rank == 0:
        signs.await_("second job has saved")
    third = save(ckpt, state, 3)
    leave(ckpt)
    return {"first": first, "second": second, "third": third}


def replace_a_zombie(rank, world, root, signs, sign):
    signs.await_(sign)
    ckpt, state = opened(root, "local-of-the-second")
    with ckpt:
        start = ckpt.resume()
        restored = state["trainer"]["steps"]
        error = save(ckpt, state, start + 1)
        ckpt.wait()  # what it found of the zombie is gone: what comes now is new
        if rank == 0:
            wake(signs)
        signs.await_("heard-0")
        error = error or save(ckpt, state, start + 2)
        if rank == 0:
            signs.give("second job has saved")
    return {"start": start, "restored": restored, "error": error}


def zombie(tmp_path, call, *, sync_timeout_s=PATIENT_S):
    """A job of two ranks whose coordinator stops in its second save, and the one that replaces it."""
    root, signs = tmp_path / "run", Signs(tmp_path / "signs")
    begin = "stopped" if sync_timeout_s == PATIENT_S else "heard-1"
    first, second = run_jobs(
        [
            Job(2, be_a_zombie, (root, signs, (call, sync_timeout_s))),
            Job(2, replace_a_zombie, (root, signs, begin)),
        ]
    )
    return root, values(first), values(second)


def test_a_zombie_that_wakes_before_it_writes_its_manifest_publishes_nothing_and_hears_that_it_was_replaced(tmp_path):
    root, old, new = zombie(tmp_path, "create")

    assert [(each["first"], each["second"].type, each["third"].type) for each in old] == [
        (None, "FencedError", "FencedError")
    ] * 2
    assert new == [{"start": 1, "restored": 1, "error": None}] * 2
    assert committed(root) == [1, 2, 3]
    left = {found.step: found.reason for found in dcpsvc.list_checkpoints(root) if found.state != "committed"}
    assert list(left) == [2, 3]
    assert "a newer job had taken the run root over" in left[2]
    assert "no manifest" in left[3]
    assert_resumes(root, 3)
    assert values(run_ranks(1, save_next, root)) == [None]
    assert [(found.step, found.state) for found in dcpsvc.list_checkpoints(root)] == [
        (step, "committed") for step in (1, 2, 3, 4)
    ]


def test_a_zombie_that_wakes_when_all_is_uploaded_writes_nothing_more(tmp_path):
    root, old, new = zombie(tmp_path, dcpsvc.Point.ACKED_REMOTE)

    assert [(each["first"], each["second"].type, each["third"].type) for each in old] == [
        (None, "FencedError", "FencedError")
    ] * 2
    assert new == [{"start": 1, "restored": 1, "error": None}] * 2
    assert committed(root) == [1, 2, 3]
    assert len(step_files(root, 2)) == 3
    assert_resumes(root, 3)


def test_a_zombie_that_wakes_after_it_wrote_its_manifest_has_committed_it_and_is_replaced_all_the_same(tmp_path):
    root, old, new = zombie(tmp_path, "get")

    assert [(each["first"], each["second"], each["third"].type) for each in old] == [(None, None, "FencedError")] * 2
    assert new == [{"start": 2, "restored": 2, "error": None}] * 2
    assert committed(root) == [1, 2, 3, 4]
    assert_resumes(root, 4)


@pytest.mark.parametrize(("call", "start"), [("create", 1), ("get", 2)])
def test_when_the_others_have_given_the_zombie_up_nobody_of_its_job_knows_and_only_the_run_root_tells(
    tmp_path, call, start
):
    root, old, new = zombie(tmp_path, call, sync_timeout_s=BRIEF_S)

    assert [(each["first"], each["second"].type, each["third"].type) for each in old] == [
        (None, "CommitUnknownError", "FencedError")
    ] * 2
    assert new == [{"start": start, "restored": start, "error": None}] * 2
    assert committed(root) == list(range(1, start + 3))
    assert_resumes(root, start + 2)


# --- two starts at the same moment ------------------------------------------------------------------

ROUNDS = 10


def save_or_hear(ckpt, state):
    """Save the next step: what was resumed, or the error that says that the job was replaced."""
    start = ckpt.resume()
    error = save(ckpt, state, start + 1)
    if error is not None and error.type == "SaveFailedError":  # the new owner has swept up under the upload
        error = save(ckpt, state, start + 2)
    return error.type if error else start


def start_together(rank, world, root, signs, name):
    """Each round: both jobs start, both wait until both have, and both save the next step. How each round went."""
    went = []
    for number in range(ROUNDS):
        signs.give(f"{number}-{name}-{rank}-ready")
        for other in ("a", "b"):
            for each in range(world):
                signs.await_(f"{number}-{other}-{each}-ready")
        try:
            ckpt, state = opened(root, f"local-{name}")
        except DcpsvcError as err:
            went.append(type(err).__name__)
            ckpt = None
        signs.give(f"{number}-{name}-{rank}-started")
        for other in ("a", "b"):
            for each in range(world):
                signs.await_(f"{number}-{other}-{each}-started")
        if ckpt is not None:
            went.append(save_or_hear(ckpt, state))
            leave(ckpt)
    return went


def test_of_two_jobs_that_start_at_the_same_moment_exactly_one_owns_the_root_ten_times_over(tmp_path):
    root, signs = tmp_path / "run", Signs(tmp_path / "signs")
    jobs = run_jobs([Job(2, start_together, (root, signs, name)) for name in "ab"], timeout_s=120)
    first, second = (values(job) for job in jobs)

    assert first[0] == first[1]
    assert second[0] == second[1]
    for number, (one, other) in enumerate(zip(first[0], second[0], strict=True)):
        losers = {"FencedError", "RunBusyError"}
        assert (one == number and other in losers) or (other == number and one in losers), (number, one, other)
    assert committed(root) == list(range(1, ROUNDS + 1))
    assert {found.state for found in dcpsvc.list_checkpoints(root)} == {"committed"}
    assert_resumes(root, ROUNDS)


# --- roots that move --------------------------------------------------------------------------------


def train_beside_a_copy(rank, world, root, signs):
    ckpt, state = opened(root, "local")
    with ckpt:
        errors = [save(ckpt, state, step) for step in (1, 2)]
        if rank == 0:
            signs.give("saved")
        signs.await_("copy has saved")
        errors += [save(ckpt, state, step) for step in (3, 4)]
    return errors


def train_a_copy(rank, world, root, signs):
    signs.await_("saved")
    copy = root.parent / "copy"
    if rank == 0:
        shutil.copytree(root, copy)
        signs.give("copied")
    signs.await_("copied")
    ckpt, state = opened(copy, "local-of-the-copy")
    with ckpt:
        start, errors = ckpt.resume(), [save(ckpt, state, 3)]
        if rank == 0:
            signs.give("copy has saved")
    return start, errors


def test_a_copy_of_a_run_root_is_a_root_of_its_own_and_takes_nothing_over(tmp_path):
    root, signs = tmp_path / "run", Signs(tmp_path / "signs")
    first, second = run_jobs([Job(2, train_beside_a_copy, (root, signs)), Job(2, train_a_copy, (root, signs))])

    assert values(first) == [[None] * 4] * 2
    assert values(second) == [(2, [None])] * 2
    assert committed(root) == [1, 2, 3, 4]
    assert committed(tmp_path / "copy") == [1, 2, 3]
    assert_resumes(root, 4)
    assert_resumes(tmp_path / "copy", 3)


def train_while_it_is_renamed(rank, world, root, signs):
    ckpt, state = opened(root, "local")
    first = save(ckpt, state, 1)
    signs.give(f"saved-{rank}")
    signs.await_("renamed")
    second = save(ckpt, state, 2)
    signs.give(f"failed-{rank}")
    leave(ckpt)
    return first, second


def train_where_it_has_gone(rank, world, root, signs):
    renamed = root.parent / "renamed"
    for old in range(2):
        signs.await_(f"saved-{old}")
    if rank == 0:
        root.rename(renamed)
        signs.give("renamed")
    for old in range(2):
        signs.await_(f"failed-{old}")
    ckpt, state = opened(renamed, "local-of-the-second")
    with ckpt:
        return ckpt.resume(), save(ckpt, state, 2)


def test_a_save_to_a_root_that_was_renamed_under_the_job_fails_and_whoever_follows_the_root_goes_on(tmp_path):
    root, signs = tmp_path / "run", Signs(tmp_path / "signs")
    first, second = run_jobs(
        [Job(2, train_while_it_is_renamed, (root, signs)), Job(2, train_where_it_has_gone, (root, signs))]
    )

    for saved, failed in values(first):
        assert saved is None
        assert failed.type == "SaveFailedError"
        assert "moved or emptied" in failed.text
    assert values(second) == [(1, None)] * 2
    assert committed(tmp_path / "renamed") == [1, 2]
    assert not list(root.glob(f"{keys.COMMITS}*"))
    assert_resumes(tmp_path / "renamed", 2)


# --- recovery and a second job ----------------------------------------------------------------------


def crash_after_the_local_ack(rank, world, root):
    ckpt, state = opened(root, f"disk-{rank}", on_event=die_at(dcpsvc.Point.ACKED_LOCAL, step=2))
    save(ckpt, state, 1)
    save(ckpt, state, 2)


def finish_it_beside_another(rank, world, root, signs, name):
    """Both jobs have disks on which the journal lies; they start at the same moment."""
    signs.give(f"{name}-{rank}")
    for other in ("a", "b"):
        for each in range(world):
            signs.await_(f"{other}-{each}")
    try:
        ckpt, state = opened(root, f"disk-{rank}" if name == "a" else f"copy-of-disk-{rank}")
    except DcpsvcError as err:
        signs.give(f"{name}-{rank}-started")
        return type(err).__name__
    signs.give(f"{name}-{rank}-started")
    for other in ("a", "b"):
        signs.await_(f"{other}-{rank}-started")
    heard = save_or_hear(ckpt, state)
    leave(ckpt)
    return heard


@pytest.mark.parametrize("_round", range(3))
def test_two_jobs_that_finish_the_same_upload_at_the_same_moment_leave_it_whole(tmp_path, _round):
    root, signs = tmp_path / "run", Signs(tmp_path / "signs")
    run_ranks(2, crash_after_the_local_ack, root)
    for rank in range(2):
        shutil.copytree(tmp_path / f"disk-{rank}", tmp_path / f"copy-of-disk-{rank}")
    jobs = run_jobs([Job(2, finish_it_beside_another, (root, signs, name)) for name in "ab"])
    first, second = (values(job) for job in jobs)

    losers = {"FencedError", "RunBusyError"}
    (one,), (other,) = set(first), set(second)
    assert (one == 2 and other in losers) or (other == 2 and one in losers), (first, second)
    assert committed(root) == [1, 2, 3]
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(tmp_path / "local")
    assert_resumes(root, 3)
