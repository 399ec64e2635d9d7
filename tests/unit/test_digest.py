"""Block tables: every byte is under exactly one digest."""

from __future__ import annotations

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc.format import digest
from dcpsvc.format.digest import BLOCK_NBYTES, DIGEST_NBYTES

BODY = bytes(range(251)) * (3 * BLOCK_NBYTES // 251) + b"the last block is short"
TABLE = digest.table(memoryview(BODY))


def test_the_digest_is_xxh3_128_as_any_other_tool_computes_it() -> None:
    assert digest.digest(b"") == "99aa06d3014798d86001c324468d497f"
    assert digest.digest(BODY) == xxhash.xxh3_128_hexdigest(BODY)
    assert TABLE[:DIGEST_NBYTES] == xxhash.xxh3_128_digest(BODY[:BLOCK_NBYTES])


@pytest.mark.parametrize(
    ("nbytes", "blocks"),
    [(0, 0), (1, 1), (BLOCK_NBYTES - 1, 1), (BLOCK_NBYTES, 1), (BLOCK_NBYTES + 1, 2), (5 * BLOCK_NBYTES, 5)],
)
def test_a_table_has_one_digest_for_each_block_begun(nbytes: int, blocks: int) -> None:
    assert digest.table_nbytes(nbytes) == blocks * DIGEST_NBYTES
    assert len(digest.table(memoryview(bytes(nbytes)))) == digest.table_nbytes(nbytes)


def test_the_blocks_are_the_body_in_order() -> None:
    assert b"".join(digest.blocks(memoryview(BODY))) == BODY
    assert list(digest.blocks(memoryview(b""))) == []


def test_the_bytes_as_they_were_written_match() -> None:
    assert digest.mismatches([memoryview(BODY)], 0, TABLE) == []
    assert digest.mismatches([memoryview(BODY)[BLOCK_NBYTES:]], 1, TABLE) == []


@given(at=st.integers(0, len(BODY) - 1), flip=st.integers(1, 255))
def test_a_changed_byte_is_found_in_its_block(at: int, flip: int) -> None:
    first = at // BLOCK_NBYTES
    block = bytearray(BODY[first * BLOCK_NBYTES : (first + 1) * BLOCK_NBYTES])
    block[at % BLOCK_NBYTES] ^= flip
    assert digest.mismatches([memoryview(block)], first, TABLE) == [first]


def test_every_bad_block_is_named() -> None:
    damaged = bytearray(BODY)
    damaged[0] ^= 1
    damaged[-1] ^= 1
    assert digest.mismatches([memoryview(damaged)], 0, TABLE) == [0, len(TABLE) // DIGEST_NBYTES - 1]


def test_a_block_beyond_the_table_never_matches() -> None:
    assert digest.mismatches([memoryview(b"more")], 99, TABLE) == [99]


def test_a_cut_block_never_matches() -> None:
    assert digest.mismatches([memoryview(BODY)[:-1]], 0, TABLE) == [len(TABLE) // DIGEST_NBYTES - 1]
