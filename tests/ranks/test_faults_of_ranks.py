"""L1-L7: one rank does something else than the others, or its disk fails; all hear the same in time and train on."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import dcpsvc
from dcpsvc import Point
from tests.ranks.lives import FAILED, MISSING, ROLES, Life, assert_the_laws_hold, side_by_side
from tests.ranks.rounds import UPLOAD_S, Brittle, Fault, does_not_save, live_through, saves_another_step

# --- what a rank itself does --------------------------------------------------------------------------


def refusing(error):
    @contextlib.contextmanager
    def around(rounds):
        rounds.counters.error = error
        yield
        rounds.counters.error = None

    return around


@contextlib.contextmanager
def another_component(rounds):
    rounds.training.state["surplus"] = 1
    yield
    del rounds.training.state["surplus"]


@contextlib.contextmanager
def uncopyable(rounds):
    before = rounds.training.state["extra"]
    rounds.training.state["extra"] = dcpsvc.PerRank(torch.zeros(1).as_subclass(Brittle))
    yield
    rounds.training.state["extra"] = before


RANKS = {
    "it never calls save()": Fault(calls=does_not_save, hears=MISSING),
    "it saves another step": Fault(calls=saves_another_step, hears=MISSING),
    "it has a component more": Fault(around=another_component, hears=FAILED, blames=("plan", ("StateMismatchError",))),
    "its state raises ValueError": Fault(
        around=refusing(ValueError("no count today")), hears=FAILED, blames=("stage", ("ValueError",))
    ),
    "its state raises MemoryError": Fault(
        around=refusing(MemoryError()), hears=FAILED, blames=("stage", ("MemoryError",))
    ),
    "its state raises OSError": Fault(
        around=refusing(OSError(errno.EIO, "I/O error")), hears=FAILED, blames=("stage", ("OSError",))
    ),
    "its state raises SystemExit": Fault(
        around=refusing(SystemExit(3)), hears=FAILED, blames=("stage", ("Unfinished",)), alone="SystemExit"
    ),
    "its state raises KeyboardInterrupt": Fault(
        around=refusing(KeyboardInterrupt()), hears=FAILED, blames=("stage", ("Unfinished",)), alone="KeyboardInterrupt"
    ),
    "its state cannot be copied": Fault(around=uncopyable, hears=FAILED, blames=("stage", ("RuntimeError",))),
}  # fmt: skip


# --- disks that fail ------------------------------------------------------------------------------------


def shard_of(rounds):
    (found,) = rounds.local.glob(f"*/data/step-{rounds.step:012d}.*/rank-{rounds.rank:05d}.safetensors")
    return found


def fill_the_disk(rounds):
    with (rounds.local / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@contextlib.contextmanager
def ballast(rounds):
    yield
    (rounds.local / "ballast").unlink(missing_ok=True)


def data_folder(rounds):
    (found,) = rounds.local.glob("*/data")
    return found


def mount(*words):
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)  # noqa: S607


def unmount(path):
    subprocess.run(["umount", str(path)], check=True, capture_output=True)  # noqa: S607


def make_it_read_only(rounds):
    folder = data_folder(rounds)
    mount("--bind", folder, folder)
    mount("-o", "remount,bind,ro", folder)


@contextlib.contextmanager
def mounted(rounds):
    yield
    unmount(data_folder(rounds))


def drop_privileges(_):
    os.seteuid(65534)


def saves_and_gets_them_back(rounds, step):
    try:
        return rounds.attempt(step)
    finally:
        os.seteuid(0)


def limit_files(_):
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))


@contextlib.contextmanager
def limited(_):
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, handler)


def remove_the_shard(rounds):
    shard_of(rounds).unlink()


def cut_the_shard(rounds):
    os.truncate(shard_of(rounds), 4096)


def flip_a_bit(rounds):
    data = bytearray(shard_of(rounds).read_bytes())
    data[len(data) // 2] ^= 1
    shard_of(rounds).write_bytes(data)


def make_it_unreadable(rounds):
    """Reading this file of the kernel's at its beginning is an I/O error."""
    shard = shard_of(rounds)
    shard.unlink()
    shard.symlink_to("/proc/self/mem")


FULL, ANY_TIME = ("StoreFullError",), ("StoreUnavailableError", "TimeoutError")
CORRUPT = ("CorruptShardError",)


def before_the_upload(does, kinds, *, hears=FAILED):
    return Fault(at=f"point {Point.ACKED_LOCAL}", does=does, hears=hears, blames=("upload", kinds), deadline_s=UPLOAD_S)


FILES = {
    "its files may not be so large": Fault(
        at=f"point {Point.STAGED}", does=limit_files, around=limited, hears=FAILED, blames=("write", ("OSError",))
    ),
    "its shard vanishes before the upload": before_the_upload(remove_the_shard, ("StoreError",)),
    "its shard is cut short before the upload": before_the_upload(cut_the_shard, CORRUPT),
    "its shard rots before the upload": before_the_upload(flip_a_bit, CORRUPT),
    "its disk fails while it is read": before_the_upload(make_it_unreadable, ANY_TIME, hears=(*FAILED, *MISSING)),
}
DISKS = {
    "its disk is full before the shard": Fault(
        at=f"point {Point.STAGED}", does=fill_the_disk, around=ballast, hears=FAILED, blames=("write", FULL)
    ),
    "its disk is full before the journal": Fault(
        at=f"point {Point.SHARD_WRITTEN}", does=fill_the_disk, around=ballast, hears=FAILED, blames=("ack", FULL)
    ),
    "its disk is read-only": Fault(
        at=f"point {Point.STAGED}", does=make_it_read_only, around=mounted, hears=FAILED, blames=("write", ("OSError",))
    ),
    "it may not write to its disk": Fault(
        at=f"point {Point.STAGED}", does=drop_privileges, calls=saves_and_gets_them_back, hears=FAILED,
        blames=("write", ("PermissionError",)),
    ),
}  # fmt: skip
"""Only root can do that."""


@contextlib.contextmanager
def small_disk(path):
    """A file system of a few MiB."""
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", path)
    try:
        yield
    finally:
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            where = line.split()[1]
            if Path(where).is_relative_to(path):
                unmount(where)


def can_mount(folder):
    try:
        with small_disk(folder):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


# --- the jobs -------------------------------------------------------------------------------------------

FAULTS = RANKS | FILES | DISKS


def live(rank, world, place, role, names):
    return live_through(rank, world, place, role, {name: FAULTS[name] for name in names})


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lived")
    lives = [life for role in ROLES for life in (
        Life(role=role, faults=RANKS, world=4), Life(role=role, faults=FILES, world=2),
    )]  # fmt: skip
    if can_mount(folder / "small"):
        lives += [Life(role=role, faults=DISKS, world=2, own_disk=small_disk) for role in ROLES]
    return side_by_side(live, lives, folder)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_rank_is_told_alike_to_all_in_time_and_costs_one_save(lived, role, name):
    if name not in lived.names:
        pytest.skip("a file system cannot be mounted here")
    assert_the_laws_hold(lived.case(role, name))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_after_all_that_the_ranks_close_in_peace_and_no_thread_is_left(lived):
    assert all(end == (None, []) for end in lived.ends()), lived.ends()
