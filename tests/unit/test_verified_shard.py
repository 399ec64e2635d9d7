"""No unproven byte gets out of a shard: damage is refused with the file's name, or read from the next store."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc.errors import CorruptShardError, StoreError
from dcpsvc.format import digest
from dcpsvc.format.digest import BLOCK_NBYTES, table_nbytes
from dcpsvc.storage.posix import PosixStore
from dcpsvc.storage.shards import VerifiedShard
from tests.unit.one_shard import (
    BODY,
    CONTENT,
    DOCUMENTS,
    INTACT,
    KEY,
    RECORD,
    CountingStore,
    SilentStore,
    flipped,
    make_shard,
    stored,
)

if TYPE_CHECKING:
    from pathlib import Path

    from dcpsvc.storage.base import Store

positions = st.integers(0, len(CONTENT) - 1)
inside = st.integers(0, len(BODY))


def assert_refused(store: Store) -> None:
    for attempt in (lambda shard: shard.verify(), lambda shard: shard.read(0, len(BODY))):
        with pytest.raises(CorruptShardError) as caught:
            attempt(VerifiedShard([store], RECORD))
        assert caught.value.path == KEY


@given(inside, inside)
def test_any_range_is_the_bytes_that_were_written(one: int, other: int) -> None:
    begin, end = sorted((one, other))
    assert VerifiedShard([INTACT], RECORD).read(begin, end) == BODY[begin:end]


def test_a_shard_on_disk_reads_as_it_was_written(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    store.put(KEY, CONTENT)
    shard = VerifiedShard([store], RECORD)
    shard.verify()
    assert shard.read(BLOCK_NBYTES - 5, BLOCK_NBYTES + 5) == BODY[BLOCK_NBYTES - 5 : BLOCK_NBYTES + 5]
    assert shard.documents() == DOCUMENTS


def test_an_empty_range_is_empty() -> None:
    assert VerifiedShard([INTACT], RECORD).read(5, 5) == b""


@given(at=st.integers(0, len(BODY) - 1), flip=st.integers(1, 255))
def test_a_flipped_byte_is_refused_when_its_block_is_read_and_only_then(at: int, flip: int) -> None:
    store = stored(flipped(at, flip))
    with pytest.raises(CorruptShardError) as caught:
        VerifiedShard([store], RECORD).read(at, at + 1)
    assert caught.value.path == KEY
    assert f"bytes {at // BLOCK_NBYTES * BLOCK_NBYTES}.." in caught.value.reason
    elsewhere = (at // BLOCK_NBYTES + 1) % 4 * BLOCK_NBYTES
    assert VerifiedShard([store], RECORD).read(elsewhere, elsewhere + 9) == BODY[elsewhere : elsewhere + 9]


@given(at=positions, flip=st.integers(1, 255))
def test_a_flipped_byte_anywhere_is_found_by_verify(at: int, flip: int) -> None:
    with pytest.raises(CorruptShardError, match=KEY):
        VerifiedShard([stored(flipped(at, flip))], RECORD).verify()


@given(at=st.integers(len(BODY), len(CONTENT) - 1), where=inside)
def test_a_flipped_byte_of_the_table_refuses_every_range(at: int, where: int) -> None:
    with pytest.raises(CorruptShardError, match="its block table does not match the manifest"):
        VerifiedShard([stored(flipped(at))], RECORD).read(min(where, len(BODY) - 1), len(BODY))


@given(st.integers(0, len(CONTENT) - 1))
def test_a_truncated_file_is_refused(nbytes: int) -> None:
    assert_refused(stored(CONTENT[:nbytes]))


def test_a_longer_file_is_refused() -> None:
    assert_refused(stored(CONTENT + b"\0"))


def test_a_missing_file_is_refused() -> None:
    assert_refused(stored(None))


def test_a_body_swapped_with_its_own_valid_table_is_refused() -> None:
    other = bytes(len(BODY))
    assert_refused(stored(other + digest.table(memoryview(other))))


@given(at=positions)
def test_the_second_store_gives_what_the_first_has_damaged(at: int) -> None:
    shard = VerifiedShard([stored(flipped(at)), INTACT], RECORD)
    assert b"".join(shard.read(*piece) for piece in shard.pieces()) == BODY


@pytest.mark.parametrize(
    "first", [None, b"", CONTENT[:-1], CONTENT[: BLOCK_NBYTES + 1]], ids=["missing", "empty", "one short", "one block"]
)
def test_the_second_store_gives_what_the_first_lacks(first: bytes | None) -> None:
    assert VerifiedShard([stored(first), INTACT], RECORD).read(0, len(BODY)) == BODY


def test_the_second_store_is_asked_when_the_first_does_not_answer() -> None:
    assert VerifiedShard([stored(kind=SilentStore), INTACT], RECORD).read(5, 9) == BODY[5:9]


def test_a_first_store_that_breaks_between_two_reads_is_left() -> None:
    near = stored()
    shard = VerifiedShard([near, INTACT], RECORD)
    assert shard.read(0, 9) == BODY[:9]
    near.put(KEY, flipped(0))
    assert shard.read(0, 9) == BODY[:9]


def test_when_every_store_is_damaged_the_file_and_the_last_place_are_named() -> None:
    first, last = stored(flipped(0)), stored(flipped(1), name="far")
    with pytest.raises(CorruptShardError) as caught:
        VerifiedShard([first, last], RECORD).read(0, 1)
    assert caught.value.path == KEY
    assert last.url in str(caught.value)


class File(PosixStore):
    """A file of this machine."""


class FarFile(PosixStore):
    """Stands for a store far away; what is only looked at is not asked of it."""

    cached = False

    def stream(self, *args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("nothing far is read only to be proven")


@pytest.mark.parametrize(
    ("near", "cheap"), [(CONTENT, True), (None, False), (CONTENT[:-1], False)], ids=["whole", "missing", "short"]
)
def test_a_shard_is_cheap_to_read_twice_if_the_nearest_store_that_has_it_is_of_files(
    tmp_path: Path, near: bytes | None, *, cheap: bool
) -> None:
    stores = File(tmp_path / "near"), FarFile(tmp_path / "far")
    stores[1].put(KEY, CONTENT)
    if near is not None:
        stores[0].put(KEY, near)
    shard = VerifiedShard(stores, RECORD)
    assert shard.cached is cheap
    assert shard.prove(0, len(BODY)) is cheap


def test_a_file_found_damaged_while_it_is_proven_is_left_for_the_far_store_and_nothing_is_proven_there(
    tmp_path: Path,
) -> None:
    near, far = File(tmp_path / "near"), FarFile(tmp_path / "far")
    near.put(KEY, flipped(5))
    far.put(KEY, CONTENT)
    shard = VerifiedShard([near, far], RECORD)
    assert shard.cached
    assert not shard.prove(0, len(BODY))
    assert not shard.cached
    assert shard.read(0, len(BODY)) == BODY


def test_a_store_that_does_not_answer_is_not_called_damage() -> None:
    with pytest.raises(StoreError, match="timed out"):
        VerifiedShard([stored(kind=SilentStore)], RECORD).read(0, 1)


def test_reading_a_quarter_reads_little_more_than_a_quarter() -> None:
    content, record = make_shard(40 * BLOCK_NBYTES)
    store = stored(content, CountingStore)
    quarter = record.body_nbytes // 4
    VerifiedShard([store], record).read(quarter + 1, 2 * quarter + 1)
    assert quarter <= store.given_out <= quarter + 2 * BLOCK_NBYTES + table_nbytes(record.body_nbytes)


def test_the_block_table_is_read_once() -> None:
    store = stored(kind=CountingStore)
    shard = VerifiedShard([store], RECORD)
    for begin in (0, BLOCK_NBYTES, 2 * BLOCK_NBYTES):
        shard.read(begin, begin + BLOCK_NBYTES)
    assert store.given_out == 3 * BLOCK_NBYTES + table_nbytes(len(BODY))


def test_the_pieces_to_read_cover_the_body_in_order() -> None:
    assert b"".join(BODY[begin:end] for begin, end in VerifiedShard([INTACT], RECORD).pieces()) == BODY


def test_verify_tells_of_every_byte() -> None:
    told: list[int] = []
    VerifiedShard([INTACT], RECORD).verify(told.append)
    assert sum(told) == len(BODY)


def test_the_documents_come_back() -> None:
    assert VerifiedShard([INTACT], RECORD).documents() == DOCUMENTS
