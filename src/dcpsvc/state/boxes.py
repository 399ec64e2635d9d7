"""Boxes of a saved chunk, and the host memory they go to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from dcpsvc.format.layout import ITEM_NBYTES
from dcpsvc.state.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Sequence


class Place(NamedTuple):
    """Where a saved chunk lies: in whose shard, from which byte on, and its extent."""

    rank: int
    begin: int
    sizes: tuple[int, ...]
    dtype: str

    @property
    def row_nbytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return math.prod(self.sizes[1:]) * ITEM_NBYTES[self.dtype]


def whole_rows(place: Place, offsets: Sequence[int], lengths: Sequence[int]) -> int | None:
    """The first byte of a box of the chunk if it is one range of the file, which it is if no row is cut; else None."""
    if any(offsets[1:]) or tuple(lengths[1:]) != tuple(place.sizes[1:]):
        return None
    return place.begin + (offsets[0] if offsets else 0) * place.row_nbytes


def memory(target: torch.Tensor, dtype: str) -> memoryview | None:
    """The bytes of ``target`` if a file's bytes can go there as they are, else None."""
    plain = type(target) is torch.Tensor or isinstance(target, torch.nn.Parameter)
    if not plain or target.device.type != "cpu" or target.dtype != dtype_of(dtype) or not target.is_contiguous():
        return None
    return memoryview(cast("Any", target.detach().reshape(-1).view(torch.uint8).numpy()))


def as_tensor(data: memoryview, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Bytes as a tensor, without a copy."""
    kind = dtype_of(dtype)
    return torch.frombuffer(data, dtype=kind).view(shape) if data else torch.empty(shape, dtype=kind)
