"""A local copy that is missing or damaged never costs a read while the run root is whole, however many ask at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dcpsvc.errors import CorruptShardError
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.storage.memory import MemoryStore
from dcpsvc.storage.shards import VerifiedShard
from tests.unit.one_shard import BODY, CONTENT, INTACT, KEY, RECORD, flipped, make_shard, stored

BOUND_S = 20.0
THREADS = 4
BLOCKS = [(n * BLOCK_NBYTES, min((n + 1) * BLOCK_NBYTES, len(BODY))) for n in range(4)]


class Together(MemoryStore):
    """Gives blocks when all threads have asked for some, so that all of them hear the bad news at once.

    The table is asked for once for all of them.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.gate = threading.Barrier(THREADS)

    def read(self, key: str, begin: int, end: int) -> bytes:
        if begin < RECORD.body_nbytes:
            self._wait()
        return super().read(key, begin, end)

    def _wait(self) -> None:
        try:
            self.gate.wait(BOUND_S)
        except threading.BrokenBarrierError:  # the first round is over; from here on nobody is waited for
            return


def read_by_all(shard: VerifiedShard, near: Together) -> list[bytes]:
    with ThreadPoolExecutor(THREADS) as pool:
        asked = [pool.submit(lambda piece=piece: bytes(shard.read(*piece))) for piece in BLOCKS]
        answers = [future.result(BOUND_S) for future in asked]
    near.gate.abort()
    return answers


@pytest.mark.parametrize("damage", ["missing", "truncated", "every block"])
def test_threads_that_find_the_local_copy_bad_together_all_read_the_run_root(damage: str) -> None:
    damaged = bytearray(CONTENT)
    for begin, _ in BLOCKS:
        damaged[begin] ^= 1
    contents = {"missing": None, "truncated": CONTENT[:-1], "every block": bytes(damaged)}
    near = stored(contents[damage], Together, name=f"mended-{damage}")
    assert b"".join(read_by_all(VerifiedShard([near, INTACT], RECORD), near)) == BODY


def test_threads_leave_two_bad_copies_for_the_third() -> None:
    near, middle = stored(None, Together, name="mended-near"), stored(flipped(0), name="mended-middle")
    assert b"".join(read_by_all(VerifiedShard([near, middle, INTACT], RECORD), near)) == BODY


def test_reading_at_random_from_many_threads_never_fails_while_the_run_root_is_whole() -> None:
    for _ in range(50):
        shard = VerifiedShard([stored(None, name="mended-empty"), INTACT], RECORD)
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(shard.read, begin, begin + 9) for begin in range(0, len(BODY) - 9, 99_991)]
            assert all(future.exception(BOUND_S) is None for future in asked)


def test_verify_falls_back_too() -> None:
    VerifiedShard([stored(None), INTACT], RECORD).verify()


@pytest.mark.parametrize("nbytes", [0, 100, BLOCK_NBYTES, len(BODY), len(CONTENT) - 1])
def test_a_truncated_run_root_behind_a_damaged_local_copy_is_a_corrupt_shard(nbytes: int) -> None:
    far = stored(CONTENT[:nbytes], name="mended-far")
    with pytest.raises(CorruptShardError) as caught:
        VerifiedShard([stored(flipped(0)), far], RECORD).read(0, 5)
    assert caught.value.path == KEY
    assert far.url in str(caught.value)


@pytest.mark.parametrize(
    ("begin", "end"),
    [(len(BODY) - 1, len(BODY) + 1), (0, len(CONTENT)), (len(BODY), len(BODY) + 1), (len(CONTENT), len(CONTENT) + 9)],
)
def test_reading_beyond_the_body_is_refused(begin: int, end: int) -> None:
    with pytest.raises(CorruptShardError) as caught:
        VerifiedShard([INTACT], RECORD).read(begin, end)
    assert caught.value.path == KEY


@pytest.mark.parametrize("numel", [0, 1, 4])
def test_documents_of_a_small_shard_come_back_and_of_a_cut_one_are_refused(numel: int) -> None:
    content, record = make_shard(numel)
    assert VerifiedShard([stored(content)], record).documents()
    with pytest.raises(CorruptShardError):
        VerifiedShard([stored(content[:7])], record).documents()
