"""Safetensors files as other tools want them: whole tensors under plain names, widest elements first."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcpsvc.format.layout import ITEM_NBYTES
from dcpsvc.format.parse import compact
from dcpsvc.format.shardfile import FOREIGN

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dcpsvc.format.layout import Tensor

_ALIGNED = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the result: its name there, its name in the checkpoint, and what it is."""

    name: str
    key: str
    tensor: Tensor
    dtype: str

    @property
    def nbytes(self) -> int:
        """In the result."""
        return math.prod(self.tensor.shape) * ITEM_NBYTES[self.dtype]


def ordered(entries: Iterable[Entry]) -> list[Entry]:
    """As they lie in a file: widest elements first, so that each is aligned."""
    return sorted(entries, key=lambda entry: (-ITEM_NBYTES[entry.dtype], entry.name))


def head(entries: Iterable[Entry]) -> bytes:
    """What comes before the tensors, which follow without gaps in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for entry in entries:
        known, parts = FOREIGN.get(entry.dtype, (entry.dtype, ()))
        end = begin + entry.nbytes
        header[entry.name] = {"dtype": known, "shape": [*entry.tensor.shape, *parts], "data_offsets": [begin, end]}
        begin = end
    text = compact(header)
    text = text.ljust(-(-len(text) // _ALIGNED) * _ALIGNED)
    return struct.pack("<Q", len(text)) + text
