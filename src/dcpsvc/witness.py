"""Whether tensors were changed while they were copied: what was remembered of them, compared with what arrived."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

import torch
import xxhash

from dcpsvc.errors import TornSnapshotError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_SAMPLES, _GROUP = 64, 16


class Watch(Enum):
    """How closely tensors are watched while they are copied."""

    NOT = auto()
    CLOSELY = auto()
    """Every write that torch counts, and some elements of each tensor."""
    EVERY_BYTE = auto()


class Extent(NamedTuple):
    """Bytes of one tensor, and where they go.

    Attributes:
        key: The tensor's.
        origin: What training writes to.
        source: Its bytes, flat.
        target: As many, in the arena.
    """

    key: str
    origin: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor


class Witness:
    """Remembers what tensors were like: how often torch has seen them written to, and some of their elements.

    torch does not count what goes through ``.data``, through a DTensor's local part or a fused kernel; but an optimizer
    changes nearly all elements.

    Args:
        extents: What is going to be copied.
        every_byte: Hash all of it, for debugging: as slow as copying it.
    """

    def __init__(self, extents: Sequence[Extent], *, every_byte: bool = False) -> None:
        self._extents, self._look = extents, _hashes if every_byte else _samples
        self._versions = [extent.origin._version for extent in extents]  # noqa: SLF001 - torch's only counter
        self._bytes = self._look(extent.source for extent in extents)

    def check(self) -> None:
        """Raises TornSnapshotError if they were changed before, or while, they were copied."""
        for extent, version in zip(self._extents, self._versions, strict=True):
            if extent.origin._version != version:  # noqa: SLF001
                raise TornSnapshotError(extent.key, TORN)
        if not torch.equal(self._bytes, self._look(extent.target for extent in self._extents)):
            raise TornSnapshotError(self._extents[0].key, f"{TORN} (it, or one of the {len(self._extents)} behind it)")


TORN = (
    "it was changed while it was copied, by something other than its optimizer's step(): wait for pending.staged "
    'before, or use staging="block"'
)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8)


def is_plain(source: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether its bytes are the file's: nothing is to be converted or gathered on the way."""
    return source.dtype == target.dtype and source.is_contiguous() and not source.is_conj() and not source.is_neg()


def _hashes(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([list(xxhash.xxh3_128_digest(part.numpy().data)) for part in parts])


def _samples(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Some elements of each, whole ones, whatever their size."""
    groups = [part[: part.numel() // _GROUP * _GROUP].view(-1, _GROUP) for part in parts]
    return torch.cat([group[:: max(1, group.shape[0] // _SAMPLES)] for group in groups])
