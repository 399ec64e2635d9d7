"""Tensors of which ranks have parts, on their way to one of them: cut into rounds that every rank works out alike."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from dcpsvc.errors import CorruptShardError
from dcpsvc.format.digest import DIGEST_NBYTES
from dcpsvc.format.layout import ITEM_NBYTES, Chunk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from dcpsvc.format.safetensors import Entry

PIECE_NBYTES = 4 << 20
ROUND_NBYTES = 16 << 20
"""What all ranks together send at a time, unless one row of a tensor is larger."""


class Piece(NamedTuple):
    """Some rows of what one rank has of a tensor."""

    entry: Entry
    chunk: Chunk

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return self.chunk.numel * ITEM_NBYTES[self.entry.tensor.dtype]


def rounds(entries: Iterable[Entry]) -> Iterator[list[Piece]]:
    """All of the tensors, in their order."""
    pieces: list[Piece] = []
    nbytes = 0
    for entry in entries:
        for piece in (Piece(entry, part) for chunk in entry.tensor.chunks for part in _cut(entry, chunk)):
            if pieces and nbytes + piece.nbytes > ROUND_NBYTES:
                yield pieces
                pieces, nbytes = [], 0
            pieces.append(piece)
            nbytes += piece.nbytes
    if pieces:
        yield pieces


def sizes(pieces: Iterable[Piece], ranks: int) -> list[int]:
    """Bytes that each rank sends in a round: its pieces one after the other, behind their digest; none if it has none.

    Args:
        pieces: Of the round.
        ranks: How many there are.
    """
    found = [0] * ranks
    for piece in pieces:
        found[piece.chunk.rank] += piece.nbytes
    return [DIGEST_NBYTES + nbytes if nbytes else 0 for nbytes in found]


def sealed(parts: Iterable[bytes | memoryview]) -> bytearray:
    """What one rank sends in a round that has pieces of it. So many zeros, instead, are of a rank that has failed."""
    data = bytearray(DIGEST_NBYTES)
    for part in parts:
        data += part
    data[:DIGEST_NBYTES] = _digest(data)
    return data


def opened(pieces: Sequence[Piece], said: Sequence[bytearray]) -> list[tuple[Piece, memoryview]]:
    """Each piece of a round with its bytes, out of what the ranks sent.

    Raises:
        CorruptShardError: It is not what the rank has, or the rank could not read it.
    """
    begins = dict.fromkeys(range(len(said)), DIGEST_NBYTES)
    found: list[tuple[Piece, memoryview]] = []
    for piece in pieces:
        rank = piece.chunk.rank
        begin, begins[rank] = begins[rank], begins[rank] + piece.nbytes
        found.append((piece, memoryview(said[rank])[begin : begins[rank]]))
    for rank, end in begins.items():
        data = said[rank]
        if end > DIGEST_NBYTES and (len(data) != end or bytes(data[:DIGEST_NBYTES]) != _digest(data)):
            raise CorruptShardError(pieces[0].entry.key, f"rank {rank} did not send what it has of it")
    return found


def assembled(arriving: Iterable[tuple[Piece, memoryview]]) -> Iterator[memoryview]:
    """The bytes of each tensor, row major, in the memory of one of them."""
    for entry, parts in itertools.groupby(arriving, key=lambda pair: pair[0].entry):
        whole = np.empty((*entry.tensor.shape, ITEM_NBYTES[entry.tensor.dtype]), dtype=np.uint8)
        for (_, chunk), data in parts:
            box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[box] = np.frombuffer(data, dtype=np.uint8).reshape(*chunk.sizes, -1)
        yield whole.reshape(-1).data


def _digest(data: bytearray) -> bytes:
    """Of what stands behind it."""
    return xxhash.xxh3_128_digest(memoryview(data)[DIGEST_NBYTES:])


def _cut(entry: Entry, chunk: Chunk) -> Iterator[Chunk]:
    """By rows, into pieces of a bounded size; what holds nothing is left out."""
    if 0 in chunk.sizes:
        return
    if not chunk.sizes:
        yield chunk
        return
    row_nbytes = math.prod(chunk.sizes[1:]) * ITEM_NBYTES[entry.tensor.dtype]
    step = max(1, PIECE_NBYTES // row_nbytes)
    for row in range(0, chunk.sizes[0], step):
        offsets = (chunk.offsets[0] + row, *chunk.offsets[1:])
        sizes = (min(step, chunk.sizes[0] - row), *chunk.sizes[1:])
        yield Chunk(chunk.rank, offsets, sizes, chunk.begin + row * row_nbytes)
