"""Who writes what: each rank's share of the state, decided without a word between the ranks.

Replicated tensors are laid end to end and cut into equal parts, one a rank, so with N replicas each copies,
holds and writes 1/N of the bytes. Every rank computes the same cuts because the claims are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc.format.layout import ITEM_NBYTES
from dcpsvc.format.shardfile import Piece
from dcpsvc.state import ragged
from dcpsvc.state.collected import Collected, Item, Sharing

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

MIN_SPLIT_NBYTES = 1 << 20
"""Tensors smaller than this are not cut: balance to the byte is not worth the pieces."""


@dataclass(frozen=True, slots=True)
class Share:
    """A piece of the shard, and which part of the tensor in this rank's hands it is.

    Attributes:
        piece: What it is in the file.
        rows: Dimension, first row and number of rows; None for all of the tensor.
        after: Of a ragged tensor: how many of its elements come before.
    """

    piece: Piece
    rows: tuple[int, int, int] | None = None
    after: int | None = None

    def source(self, collected: Collected) -> torch.Tensor:
        """The tensor, or view of one, whose values it holds."""
        tensor = collected.items[self.piece.key].tensor
        if self.after is not None:
            return tensor.narrow(0, self.after, math.prod(self.piece.sizes)).view(self.piece.sizes)
        return tensor if self.rows is None else tensor.narrow(*self.rows)


class Structure:
    """All that :func:`shares` goes by: equal structures are divided alike, in whatever order. Holds no tensor."""

    def __init__(self, collected: Collected) -> None:
        self._items = [
            (key, item.dtype, item.shape, item.offsets, item.sharing, item.writes, tuple(item.tensor.shape))
            for key, item in collected.items.items()
        ]

    def is_of(self, collected: Collected) -> bool:
        """Whether this is the structure of ``collected``. Makes no objects: there may be 100,000 tensors, each save."""
        items = collected.items
        return len(self._items) == len(items) and all(
            (item := items.get(key)) is not None
            and item.dtype == dtype
            and item.shape == shape
            and item.offsets == offsets
            and item.sharing is sharing
            and item.writes == writes
            and item.tensor.shape == local
            for key, dtype, shape, offsets, sharing, writes, local in self._items
        )


def shares(collected: Collected, rank: int, world_size: int) -> list[Share]:
    """What ``rank`` of ``world_size`` writes."""
    mine = [share for key, item in collected.items.items() if _is_mine(item, rank) for share in _of(key, item)]
    return mine + list(_replicated(collected, rank, world_size))


def _is_mine(item: Item, rank: int) -> bool:
    match item.sharing:
        case Sharing.SHARDED | Sharing.PER_RANK:
            return item.writes and (item.tensor.numel() > 0 or math.prod(item.shape) == 0)
        case Sharing.FIRST:
            return rank == 0
        case Sharing.REPLICATED:
            return False


def _of(key: str, item: Item) -> Iterator[Share]:
    if not item.is_ragged:
        yield _whole(key, item)
        return
    if 0 in item.shape:
        yield Share(Piece(key, item.dtype, item.shape, (0,) * len(item.shape), item.shape), after=0)
    for after, offsets, sizes in ragged.boxes(item.shape, item.offsets[0], item.tensor.numel()):
        yield Share(Piece(key, item.dtype, item.shape, offsets, sizes), after=after)


def _whole(key: str, item: Item) -> Share:
    return Share(Piece(key, item.dtype, item.shape, item.offsets, tuple(item.tensor.shape)))


def _replicated(collected: Collected, rank: int, world_size: int) -> Iterator[Share]:
    items = sorted((key, item) for key, item in collected.items.items() if item.sharing is Sharing.REPLICATED)
    total = sum(_nbytes(item) for _, item in items)
    low, high = rank * total // world_size, (rank + 1) * total // world_size
    begin = 0
    for key, item in items:
        end = begin + _nbytes(item)
        rows = _rows(item, begin, end, low, high, last=rank == world_size - 1)
        if rows is not None:
            yield _part(key, item, *rows)
        begin = end


def _rows(item: Item, begin: int, end: int, low: int, high: int, *, last: bool) -> tuple[int, int, int] | None:
    """Dimension and row range of ``item``, at bytes ``[begin, end)``, that belong to the part ``[low, high)``.

    A tensor that is not cut belongs to the part its first byte is in.
    """
    dim = next((d for d, extent in enumerate(item.shape) if extent > 1), None)
    if dim is None or end - begin < MIN_SPLIT_NBYTES:
        owned = low <= begin < high or (last and begin >= high)
        return (0, 0, -1) if owned else None
    row_nbytes = (end - begin) // item.shape[dim]
    first, stop = (_row(at - begin, row_nbytes, item.shape[dim]) for at in (low, high))
    return (dim, first, stop) if first < stop else None


def _row(nbytes: int, row_nbytes: int, rows: int) -> int:
    return min(max(-(-nbytes // row_nbytes), 0), rows)


def _part(key: str, item: Item, dim: int, first: int, stop: int) -> Share:
    if stop < 0 or (first == 0 and stop == item.shape[dim]):
        return _whole(key, item)
    offsets = tuple(first if d == dim else 0 for d in range(len(item.shape)))
    sizes = tuple(stop - first if d == dim else extent for d, extent in enumerate(item.shape))
    return Share(Piece(key, item.dtype, item.shape, offsets, sizes), (dim, first, stop - first))


def _nbytes(item: Item) -> int:
    return math.prod(item.shape) * ITEM_NBYTES[item.dtype]
