"""A tensor of which a rank holds consecutive elements, as if it were flat: no box of it, as a DTensor's part is.

Written as the few boxes that make up those elements, and read as the smallest box that has them all, so that
checkpoints know of boxes only.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Holders:
    """Which ranks hold a tensor.

    Attributes:
        alike: Global ranks that hold the same elements, this one among them.
        everyone: Those that hold any; None: all, or not known.
    """

    alike: tuple[int, ...]
    everyone: tuple[int, ...] | None = None

    def count(self, holder: int) -> bool:
        """Whether they write: of several groups that hold the same tensor each, the one with ``holder`` does."""
        return self.everyone is None or holder in self.everyone


class Ragged(torch.Tensor):
    """Shape and dtype of the whole tensor; has no elements itself and can be computed with by nobody.

    Attributes:
        local: The elements that are here, 1-D.
        begin: Which of the flat tensor's is the first of them.
        origin: What training writes to, as far as torch counts writes.
        holders: Who holds what.
    """

    local: torch.Tensor
    begin: int
    origin: torch.Tensor
    holders: Holders

    def __new__(
        cls, local: torch.Tensor, shape: Sequence[int], begin: int, origin: torch.Tensor, holders: Holders
    ) -> Self:
        """As the attributes say."""
        make = cast("Any", torch.Tensor)._make_wrapper_subclass  # noqa: SLF001 - how torch has a tensor made that is none
        self: Self = make(cls, torch.Size(shape), dtype=local.dtype, device=local.device)
        self.local, self.begin, self.origin, self.holders = local.detach(), begin, origin, holders
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Nothing can be computed: it would be on a part only."""
        raise NotImplementedError(f"{func} on elements of a tensor whose rest is on other ranks")

    def detach(self) -> Ragged:
        """Itself."""
        return self

    def like(self, local: torch.Tensor) -> Ragged:
        """Others of the same place."""
        return Ragged(local, self.shape, self.begin, local, self.holders)

    @property
    def leads(self) -> bool:
        """Whether the first element is here: that rank writes what there is once for all elements."""
        return self.begin == 0 and self.local.numel() > 0

    def bounding(self) -> tuple[Shape, Shape]:
        """Offsets and sizes of the smallest box that has all elements."""
        return bounding(tuple(self.shape), self.begin, self.local.numel())

    def picked(self, box: torch.Tensor) -> torch.Tensor:
        """Its elements, 1-D, out of the box that :meth:`bounding` gives."""
        offsets, sizes = self.bounding()
        first = self.begin - sum(o * s for o, s in zip(offsets, strides(tuple(self.shape)), strict=True))
        return box.expand(sizes).reshape(-1)[first : first + self.local.numel()]


def strides(shape: Shape) -> Shape:
    """Elements between two neighbours along each dimension."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def bounding(shape: Shape, begin: int, numel: int) -> tuple[Shape, Shape]:
    """Offsets and sizes of the smallest box of whole rows that has ``numel`` elements from ``begin`` on."""
    if numel == 0:
        return (0,) * len(shape), (0,) * len(shape)
    first, last = (_index(shape, at) for at in (begin, begin + numel - 1))
    cut = next((dim for dim, (a, b) in enumerate(zip(first, last, strict=True)) if a != b), len(shape))
    offsets = tuple(at if dim <= cut else 0 for dim, at in enumerate(first))
    sizes = tuple(
        1 if dim < cut else last[dim] - first[dim] + 1 if dim == cut else extent for dim, extent in enumerate(shape)
    )
    return offsets, sizes


def boxes(shape: Shape, begin: int, numel: int) -> Iterator[tuple[int, Shape, Shape]]:
    """The boxes that consecutive elements make up: elements before it, offsets and sizes of each, in their order.

    At most two for each dimension but the last, where it is one: the end of a row, whole rows, the beginning of a row.
    """
    at, end, steps = begin, begin + numel, strides(shape)
    while at < end:
        # The largest step that is aligned here and fits: whole rows of the outermost dimension possible.
        dim = next(d for d, step in enumerate(steps) if at % step == 0 and at + step <= end)
        index = _index(shape, at)
        count = min((end - at) // steps[dim], shape[dim] - index[dim])
        sizes = itertools.chain([1] * dim, [count], shape[dim + 1 :])
        yield at - begin, index, tuple(sizes)
        at += count * steps[dim]


def _index(shape: Shape, at: int) -> Shape:
    return tuple(at // step % extent for step, extent in zip(strides(shape), shape, strict=True))
