"""Who writes what: each rank's share of the state, decided without a word between the ranks.

What several ranks hold alike, all of them or those with the same part, is laid end to end and cut into equal parts, one
a rank: with N replicas each copies, holds and writes 1/N of the bytes. Every one of them computes the same cuts because
they hold the same.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc.format.layout import ITEM_NBYTES
from dcpsvc.format.shardfile import Piece
from dcpsvc.state import ragged
from dcpsvc.state.collected import Collected, Item, Sharing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from dcpsvc.format.layout import Shape

MIN_SPLIT_NBYTES = 1 << 20
"""Tensors, and parts of them, that are smaller are not cut: balance to the byte is not worth the pieces."""


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

    @property
    def is_whole(self) -> bool:
        """Whether it is all of that tensor, as it is."""
        return self.rows is None and self.after is None

    def source(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or view of it, whose values it holds."""
        if self.after is not None:
            return tensor.narrow(0, self.after, math.prod(self.piece.sizes)).view(self.piece.sizes)
        return tensor if self.rows is None else tensor.narrow(*self.rows)


class Structure:
    """All that :func:`shares` and claims go by: equal structures are divided alike, in whatever order. No tensor."""

    def __init__(self, collected: Collected) -> None:
        self._items = [
            (
                key, item.dtype, item.shape, item.offsets, item.sharing, item.writes, item.validate, item.alike,
                tuple(item.tensor.shape),
            )
            for key, item in collected.items.items()
        ]  # fmt: skip

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
            and item.validate == validate
            and (item.alike is alike or item.alike == alike)  # of thousands of ranks, mostly the same object
            and item.tensor.shape == local
            for key, dtype, shape, offsets, sharing, writes, validate, alike, local in self._items
        )


def shares(collected: Collected, rank: int, world_size: int) -> list[Share]:
    """What ``rank`` of ``world_size`` writes."""
    by_writers: dict[Shape, dict[str, Item]] = defaultdict(dict)
    by_all: dict[str, Item] = {}
    for key, item in collected.items.items():
        if item.sharing is Sharing.REPLICATED:
            by_all[key] = item
        elif writers := _writers(item, rank):
            by_writers[writers][key] = item
    by_writers[tuple(range(world_size))] |= by_all
    return [
        share for writers, items in by_writers.items() for share in _divided(items, writers.index(rank), len(writers))
    ]


def _writers(item: Item, rank: int) -> Shape:
    """Those that write what this rank holds of a tensor, together; nobody, if others do."""
    if item.sharing is Sharing.FIRST:
        return (0,) if rank == 0 else ()
    is_empty = item.tensor.numel() == 0 and math.prod(item.shape) > 0
    return (item.alike or (rank,)) if item.writes and not is_empty else ()


def _divided(items: dict[str, Item], place: int, number: int) -> Iterator[Share]:
    """What one of ``number`` ranks writes of tensors that they hold alike.

    A tensor that is not cut belongs to the rank in whose part its first byte is.
    """
    total = sum(map(_nbytes, items.values()))
    low, high = place * total // number, (place + 1) * total // number
    begin = 0
    for key, item in sorted(items.items()):
        end = begin + _nbytes(item)
        unit = _unit(item)
        if unit is None or end - begin < MIN_SPLIT_NBYTES:
            if low <= begin < high or (place == number - 1 and begin >= high):
                yield from _part(key, item, 0, item.tensor.numel())
        else:
            first, stop = (_cut(item, at - begin, unit) for at in (low, high))
            if first < stop:
                yield from _part(key, item, first, stop)
        begin = end


def _unit(item: Item) -> int | None:
    """Elements of a row along the first dimension that has several: a tensor is cut between rows. None: it has none."""
    shape = item.shape if item.is_ragged else item.tensor.shape
    dim = next((d for d, extent in enumerate(shape) if extent > 1), None)
    return None if dim is None else math.prod(shape[dim + 1 :])


def _cut(item: Item, nbytes: int, unit: int) -> int:
    """Before how manieth of its elements a tensor is cut: where the first row begins that has ``nbytes`` before it."""
    if nbytes <= 0:
        return 0
    before = item.offsets[0] if item.is_ragged else 0  # its elements may begin within a row
    elements = before - (-nbytes // ITEM_NBYTES[item.dtype])
    return min(max(-(-elements // unit) * unit - before, 0), item.tensor.numel())


def _part(key: str, item: Item, first: int, stop: int) -> Iterable[Share]:
    """Of the elements that are here those of ``[first, stop)``, as boxes."""
    if item.is_ragged:
        return _boxes(key, item, first, stop)
    local = tuple(item.tensor.shape)
    if stop - first == item.tensor.numel():
        return [Share(Piece(key, item.dtype, item.shape, item.offsets, local))]
    dim = next(d for d, extent in enumerate(local) if extent > 1)
    row, number = first * local[dim] // item.tensor.numel(), (stop - first) * local[dim] // item.tensor.numel()
    offsets = tuple(at + row if d == dim else at for d, at in enumerate(item.offsets))
    sizes = tuple(number if d == dim else extent for d, extent in enumerate(local))
    held = local if local != item.shape else ()
    return [Share(Piece(key, item.dtype, item.shape, offsets, sizes, held), (dim, row, number))]


def _boxes(key: str, item: Item, first: int, stop: int) -> Iterator[Share]:
    if 0 in item.shape:
        yield Share(Piece(key, item.dtype, item.shape, (0,) * len(item.shape), item.shape), after=0)
    for after, offsets, sizes in ragged.boxes(item.shape, item.offsets[0] + first, stop - first):
        yield Share(Piece(key, item.dtype, item.shape, offsets, sizes), after=first + after)


def _nbytes(item: Item) -> int:
    return item.tensor.numel() * ITEM_NBYTES[item.dtype]
