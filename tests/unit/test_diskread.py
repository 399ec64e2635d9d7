"""Ranges of files: what memory has comes from there, the rest around the page cache; every byte is where it belongs."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
from typing import TYPE_CHECKING

import pytest

from dcpsvc import linux
from dcpsvc.errors import CorruptShardError, StoreError
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.storage import diskread
from dcpsvc.storage.posix import PosixStore
from dcpsvc.storage.shards import VerifiedShard
from tests.unit.one_shard import BODY, CONTENT, KEY, RECORD, flipped

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATA = random.Random(1).randbytes(9 * BLOCK_NBYTES + 4321)


def forget(path: Path) -> None:
    """The page cache has nothing of the file."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if resident(path):
        pytest.skip("this file system keeps what it was told to forget")


def resident(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return linux.resident_nbytes(fd, 0, path.stat().st_size)
    finally:
        os.close(fd)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    forget(path)
    return path


def memory(nbytes: int) -> list[memoryview]:
    """In pieces that end anywhere, one of them empty."""
    whole, cuts = memoryview(bytearray(nbytes)), [0, 5, 5, BLOCK_NBYTES + 77, 3 * BLOCK_NBYTES, nbytes]
    return [whole[low:high] for low, high in itertools.pairwise(cuts)]


def filled(path: Path, begin: int, *, once: bool) -> bool:
    """Says whether it went around the page cache."""
    fd = os.open(path, os.O_RDONLY)
    views = memory(len(DATA) - begin)
    seen = b"".join(bytes(view) for view in diskread.filling(fd, begin, views, once=once))
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    os.close(fd)
    assert seen == DATA[begin:]
    assert b"".join(views) == DATA[begin:]
    return bool(flags & os.O_DIRECT)


def test_what_memory_lacks_and_nobody_reads_again_is_read_around_the_page_cache(file: Path) -> None:
    assert filled(file, BLOCK_NBYTES, once=True)
    assert not resident(file)


def test_what_will_be_read_again_stays_in_the_page_cache(file: Path) -> None:
    assert not filled(file, 0, once=False)
    assert resident(file) == len(DATA)


def test_what_memory_has_comes_from_there(file: Path) -> None:
    file.read_bytes()
    assert not filled(file, 0, once=True)


def test_a_range_that_begins_inside_a_page_is_read_too(file: Path) -> None:
    assert not filled(file, 1234, once=True)


def test_bytes_that_are_only_looked_at_are_those_of_the_file(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    seen = b"".join(bytes(view) for view in diskread.passing(fd, BLOCK_NBYTES, len(DATA)))
    os.close(fd)
    assert seen == DATA[BLOCK_NBYTES:]


def test_a_file_in_memory_only_is_read_as_it_is(tmp_path: Path) -> None:
    fd = os.memfd_create("file")
    os.write(fd, DATA)
    views = memory(len(DATA))
    assert b"".join(bytes(view) for view in diskread.filling(fd, 0, views, once=True)) == DATA
    os.close(fd)


@pytest.mark.parametrize("once", [True, False])
def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(tmp_path: Path, *, once: bool) -> None:
    store = PosixStore(tmp_path)
    store.put("data/x", DATA)
    forget(tmp_path / "data/x")

    def look(views: Iterator[memoryview]) -> int:
        count = len(next(views))
        os.truncate(tmp_path / "data/x", BLOCK_NBYTES)
        return count + sum(map(len, views))

    with pytest.raises(StoreError):
        store.stream_into("data/x", 0, [memoryview(bytearray(len(DATA)))], look, once=once)


@pytest.mark.parametrize("at", [0, BLOCK_NBYTES, len(BODY) - 1])
def test_damage_is_refused_also_around_the_page_cache(tmp_path: Path, at: int) -> None:
    store = PosixStore(tmp_path)
    for content, right in ((CONTENT, True), (flipped(at), False)):
        store.put(KEY, content)
        forget(tmp_path / KEY)
        target = memoryview(bytearray(len(BODY)))
        if right:
            VerifiedShard([store], RECORD).read_into(0, [target], once=True)
            assert target == BODY
        else:
            with pytest.raises(CorruptShardError, match=f"bytes {at // BLOCK_NBYTES * BLOCK_NBYTES}"):
                VerifiedShard([store], RECORD).read_into(0, [target], once=True)
