"""Checksums: XXH3-128 per block, and one digest over the block digests.

A file is covered by a table with one 16-byte digest per block of :data:`BLOCK_NBYTES`. The table is
stored with the data; its own digest is in the manifest. So any byte range is proven by reading the
table and the blocks it touches, and a whole file in one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BLOCK_NBYTES = 1 << 20
"""Bytes of one block: small enough that reading a slice reads little more, large enough to cost nothing."""

DIGEST_NBYTES = 16


def digest(data: bytes | memoryview) -> str:
    """XXH3-128 as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def table_nbytes(body_nbytes: int) -> int:
    """Size of the table that covers a body."""
    return DIGEST_NBYTES * -(-body_nbytes // BLOCK_NBYTES)


def table(body: memoryview) -> bytes:
    """The table over a whole body in memory."""
    return b"".join(xxhash.xxh3_128_digest(block) for block in blocks(body))


def blocks(body: memoryview) -> Iterator[memoryview]:
    """The body cut at block boundaries."""
    for begin in range(0, len(body), BLOCK_NBYTES):
        yield body[begin : begin + BLOCK_NBYTES]


def mismatches(views: Iterable[memoryview], first_block: int, digests: bytes) -> list[int]:
    """Numbers of the blocks in ``views`` (which together start at ``first_block``) that differ from the table."""
    return [
        number
        for number, found in enumerate(digests_of(views), first_block)
        if found != digests[number * DIGEST_NBYTES : (number + 1) * DIGEST_NBYTES]
    ]


def digests_of(views: Iterable[memoryview]) -> Iterator[bytes]:
    """Of each block of views that follow one another."""
    running, room = xxhash.xxh3_128(), BLOCK_NBYTES
    for view in views:
        at = 0
        while at < len(view):
            part = view[at : at + room]
            at, room = at + len(part), room - len(part)
            if len(part) == BLOCK_NBYTES:
                yield xxhash.xxh3_128_digest(part)
                room = BLOCK_NBYTES
                continue
            running.update(part)
            if not room:
                yield running.digest()
                running, room = xxhash.xxh3_128(), BLOCK_NBYTES
    if room < BLOCK_NBYTES:
        yield running.digest()
