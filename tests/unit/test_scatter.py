"""Ranges of a shard are read in file order, in whole blocks, each once, and land where they belong or nowhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc.errors import CorruptShardError
from dcpsvc.format.digest import BLOCK_NBYTES, table_nbytes
from dcpsvc.storage.scatter import PIECE_NBYTES, Needs, Segment
from dcpsvc.storage.shards import VerifiedShard
from tests.unit.one_shard import BODY, INTACT, RECORD, CountingStore, flipped, make_shard, stored

LARGE, LARGE_RECORD = make_shard(20 * BLOCK_NBYTES)
ranges = st.lists(st.tuples(st.integers(0, len(BODY)), st.integers(0, len(BODY))).map(sorted), max_size=12)


def wanted(places: list[list[int]]) -> list[Segment]:
    return [Segment(begin, memoryview(bytearray(end - begin))) for begin, end in places]


@given(ranges, st.booleans())
def test_whatever_is_asked_for_arrives(places: list[list[int]], direct: bool) -> None:  # noqa: FBT001
    segments, shard = wanted(places), VerifiedShard([INTACT], RECORD)
    for piece in Needs(segments, RECORD.body_nbytes).pieces():
        assert piece.begin % BLOCK_NBYTES == 0
        assert piece.end - piece.begin <= PIECE_NBYTES
        piece.read(shard, direct=direct)
    assert [bytes(segment.view) for segment in segments] == [BODY[begin:end] for begin, end in places]


def test_neighbours_that_share_a_block_read_it_once_and_gaps_are_left_out() -> None:
    store = stored(LARGE, CountingStore)
    small = [[at, at + 1000] for at in range(5 * BLOCK_NBYTES, 7 * BLOCK_NBYTES, 1000)]
    shard = VerifiedShard([store], LARGE_RECORD)
    needs = Needs(wanted([*small, [15 * BLOCK_NBYTES, 16 * BLOCK_NBYTES]]), LARGE_RECORD.body_nbytes)
    for piece in needs.pieces():
        piece.read(shard, direct=True)
    assert store.given_out <= 4 * BLOCK_NBYTES + table_nbytes(LARGE_RECORD.body_nbytes)


def test_a_quarter_of_a_shard_reads_about_a_quarter() -> None:
    store, quarter = stored(LARGE, CountingStore), LARGE_RECORD.body_nbytes // 4
    for piece in Needs(wanted([[quarter, 2 * quarter]]), LARGE_RECORD.body_nbytes).pieces():
        piece.read(VerifiedShard([store], LARGE_RECORD), direct=True)
    assert quarter <= store.given_out <= quarter + 2 * BLOCK_NBYTES + table_nbytes(LARGE_RECORD.body_nbytes)


@given(ranges.filter(any), st.integers(0, len(BODY) - 1))
def test_a_flipped_byte_in_a_needed_block_is_refused_and_elsewhere_it_is_not_looked_at(
    places: list[list[int]], at: int
) -> None:
    shard = VerifiedShard([stored(flipped(at))], RECORD)
    for piece in Needs(wanted(places), RECORD.body_nbytes).pieces():
        if piece.begin <= at < piece.end:
            with pytest.raises(CorruptShardError):
                piece.read(shard, direct=True)
        else:
            piece.read(shard, direct=True)


def test_nothing_unproven_is_delivered_where_somebody_might_look() -> None:
    (segment,) = wanted([[0, len(BODY)]])
    shard = VerifiedShard([stored(flipped(len(BODY) // 2))], RECORD)
    for piece in Needs([segment], RECORD.body_nbytes).pieces():
        with pytest.raises(CorruptShardError):
            piece.read(shard, direct=False)
    assert not any(bytes(segment.view))


def test_what_one_store_has_damaged_comes_from_the_next() -> None:
    (segment,) = wanted([[7, len(BODY) - 7]])
    shard = VerifiedShard([stored(flipped(100)), INTACT], RECORD)
    for piece in Needs([segment], RECORD.body_nbytes).pieces():
        piece.read(shard, direct=True)
    assert segment.view == BODY[7:-7]
