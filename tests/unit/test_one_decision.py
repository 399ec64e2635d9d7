"""512 ranks, one LIST: which checkpoint to resume from is decided once and told to all."""

import threading
from collections import Counter

import pytest

import dcpsvc
from dcpsvc.errors import RestoreFailedError, StoreUnavailableError
from dcpsvc.ranks.c10d import Group, SoloStore
from dcpsvc.ranks.job import Job
from dcpsvc.ranks.rendezvous import Rendezvous
from dcpsvc.resuming import Resuming
from dcpsvc.state.app import AppState
from dcpsvc.state.drift import Terms
from dcpsvc.storage.posix import PosixStore

WORLD = 512


class CountingStore(PosixStore):
    """A directory that counts what is asked of it."""

    def __init__(self, root):
        super().__init__(root)
        self.asked = Counter()

    def list(self, prefix):
        self.asked[f"LIST {prefix.split('/')[0]}"] += 1
        return super().list(prefix)


class DeafStore(PosixStore):
    """A directory whose listing fails, as a throttled bucket does."""

    def list(self, prefix):
        raise StoreUnavailableError("list", prefix, "503 SlowDown")


@pytest.fixture
def root(tmp_path):
    with dcpsvc.Checkpointer(tmp_path / "root", {"n": [1, 2, 3]}, local=tmp_path / "local") as checkpointer:
        checkpointer.save(900)
        checkpointer.save(10000)
    return tmp_path / "root"


def resume_on_all(world, store):
    """Every rank is a thread; they share the key-value store and the run root, and nothing else."""
    shared, results = SoloStore(), [None] * world

    def rank_main(rank):
        rendezvous = Rendezvous(rank, world, shared, namespace="run")
        group = Group(rank=rank, world_size=world, namespace="run", timeout_s=50)
        job = Job(rank, world, "run", rendezvous, group, None, None)
        state = {"n": []}
        try:
            found = Resuming(job, "resume", store, (), AppState(state), 50, 50).run(None, Terms())
            results[rank] = (found.attempt.step, state["n"])
        except RestoreFailedError as err:
            results[rank] = str(err)

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=55)
    return results


def test_512_ranks_list_the_run_root_once_and_all_resume_from_the_largest_step(root):
    store = CountingStore(root)
    assert resume_on_all(WORLD, store) == [(10000, [1, 2, 3])] * WORLD
    assert store.asked == {"LIST manifests": 1, "LIST data": 1}


def test_a_listing_that_fails_is_an_error_on_every_rank_and_never_a_fresh_start(root):
    results = resume_on_all(8, DeafStore(root))
    assert len(set(results)) == 1
    assert "503 SlowDown" in results[0]
