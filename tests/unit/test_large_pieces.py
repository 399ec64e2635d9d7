"""Files are read in larger pieces where that takes no memory: finding and opening one costs more than it looks."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, TypeVar

import pytest

from dcpsvc.format import digest
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.format.keys import Attempt
from dcpsvc.format.manifest import ShardRecord
from dcpsvc.storage.fetch import fetch
from dcpsvc.storage.posix import PosixStore
from dcpsvc.storage.scatter import PIECE_NBYTES, Needs, Segment
from dcpsvc.storage.shards import VerifiedShard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

T = TypeVar("T")
KEY = Attempt(7, "cafe-0").shard(0)
LARGE_NBYTES, SMALL_NBYTES = 512 << 20, 48 << 20


class Opened(PosixStore):
    """Notes what is read each time the file is opened."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.ranges: list[tuple[int, int]] = []

    def stream(self, key: str, begin: int, end: int, look: Callable[[Iterator[memoryview]], T]) -> T:
        self.ranges.append((begin, end))
        return super().stream(key, begin, end, look)

    def stream_into(
        self, key: str, begin: int, views: Sequence[memoryview], look: Callable[[Iterator[memoryview]], T], *,
        once: bool = False,
    ) -> T:  # fmt: skip
        self.ranges.append((begin, begin + sum(map(len, views))))
        return super().stream_into(key, begin, views, look, once=once)

    @property
    def largest(self) -> int:
        """Of all that was read at once."""
        return max(end - begin for begin, end in self.ranges)


class Passing:
    """Takes proven bytes only, as a tensor on a device does."""

    view, begin = None, 0

    def __init__(self, nbytes: int) -> None:
        self.end = nbytes

    def filled(self, nbytes: int) -> None:
        raise AssertionError(nbytes)

    def put(self, begin: int, proven: memoryview) -> None:
        pass


def holed(folder: Path, nbytes: int) -> tuple[Opened, VerifiedShard]:
    """A shard of zeros that takes no room on the disk."""
    path = folder / KEY
    path.parent.mkdir(parents=True)
    table = digest.table(memoryview(bytes(BLOCK_NBYTES))) * (nbytes // BLOCK_NBYTES)
    with path.open("wb") as file:
        file.seek(nbytes)
        file.write(table)
    store = Opened(folder)
    record = ShardRecord(rank=0, path=KEY, nbytes=nbytes + len(table), body_nbytes=nbytes, digest=digest.digest(table))
    return store, VerifiedShard([store], record)


def everything(nbytes: int) -> Segment:
    return Segment(0, memoryview(mmap.mmap(-1, nbytes)))


@pytest.mark.parametrize("proving", [True, False], ids=["proven", "in place"])
def test_a_large_file_is_opened_half_as_often_and_each_byte_is_read_once(tmp_path: Path, proving: bool) -> None:  # noqa: FBT001
    store, shard = holed(tmp_path, LARGE_NBYTES)
    needs = Needs([everything(LARGE_NBYTES)], LARGE_NBYTES)
    fetch({0: shard}, {0: needs}, proving=proving, direct=not proving)
    assert len(store.ranges) <= LARGE_NBYTES // PIECE_NBYTES // 2
    ends = [end for _, end in sorted(store.ranges)]
    assert sorted(store.ranges) == list(zip([0, *ends], ends, strict=False))
    assert ends[-1] == LARGE_NBYTES


def test_a_small_file_is_cut_so_that_every_thread_has_some_of_it(tmp_path: Path) -> None:
    store, shard = holed(tmp_path, SMALL_NBYTES)
    fetch({0: shard}, {0: Needs([everything(SMALL_NBYTES)], SMALL_NBYTES)}, proving=True)
    assert store.largest == PIECE_NBYTES


@pytest.mark.parametrize("direct", [True, False])
def test_what_goes_through_memory_of_a_thread_comes_in_small_pieces_from_a_large_file(
    tmp_path: Path, direct: bool  # noqa: FBT001
) -> None:  # fmt: skip
    store, shard = holed(tmp_path, LARGE_NBYTES)
    sink = Passing(LARGE_NBYTES) if direct else everything(LARGE_NBYTES)
    fetch({0: shard}, {0: Needs([sink], LARGE_NBYTES)}, direct=direct)
    assert store.largest == PIECE_NBYTES


def test_what_two_places_need_comes_in_small_pieces(tmp_path: Path) -> None:
    store, shard = holed(tmp_path, LARGE_NBYTES)
    twice = [everything(LARGE_NBYTES), Segment(BLOCK_NBYTES, memoryview(bytearray(BLOCK_NBYTES)))]
    fetch({0: shard}, {0: Needs(twice, LARGE_NBYTES)}, direct=True)
    assert store.largest == PIECE_NBYTES
