"""One rank's part of the state at one step: tensors by reference, documents by value, and what they claim."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from dcpsvc.errors import StateError, UnsupportedStateError
from dcpsvc.state.dtypes import name_of

if TYPE_CHECKING:
    from collections.abc import Hashable

    from dcpsvc.format.layout import Shape


class Sharing(StrEnum):
    """Who holds a tensor, so who writes it."""

    SHARDED = "sharded"
    """Each rank holds a part (DTensor)."""
    REPLICATED = "replicated"
    """All ranks hold the same; verified equal, then each writes a share of the bytes."""
    FIRST = "first"
    """Rank 0's counts, whatever the others hold: module buffers, as DDP broadcasts them."""
    PER_RANK = "per-rank"
    """Each rank holds its own; the key carries the rank."""


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor of the state as this rank holds it.

    Attributes:
        tensor: The local part, not a copy.
        dtype: Safetensors name.
        shape: Of the whole tensor.
        offsets: Where the local part begins in it.
        sharing: Who holds it.
        writes: Whether this rank writes its part (a sharded tensor may also be replicated).
        origin: What training writes to, as far as torch counts writes: the DTensor around a local part.
        owner: ``id`` of the optimizer that alone changes it; None: anybody may, at any time.
    """

    tensor: torch.Tensor
    dtype: str
    shape: Shape
    offsets: Shape
    sharing: Sharing
    writes: bool
    origin: torch.Tensor
    owner: int | None = None

    @property
    def claim(self) -> str:
        """What every rank must agree on."""
        return f"{self.dtype}{list(self.shape)} {self.sharing}"


@dataclass(slots=True)
class Collected:
    """What one rank would save now.

    Attributes:
        rank: Global rank.
        items: Tensors by key.
        aliases: Further names of tensors stored once.
        documents: JSON values by component that all ranks share.
        own_documents: JSON values of this rank alone; the names carry the rank.
        owners: ``id`` of each parameter that exactly one optimizer changes, and of that optimizer.
    """

    rank: int
    items: dict[str, Item] = field(default_factory=dict[str, Item])
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    documents: dict[str, Any] = field(default_factory=dict[str, Any])
    own_documents: dict[str, Any] = field(default_factory=dict[str, Any])
    owners: dict[int, int] = field(default_factory=dict[int, int])

    def add(self, key: str, tensor: torch.Tensor, sharing: Sharing, owner: int | None = None) -> None:
        """Take a tensor in; a DTensor is sharded whatever ``sharing`` says."""
        if key in self.items or key in self.aliases:
            raise StateError(key, "two tensors of the state would have this name")
        self.items[key] = _item(key, tensor, sharing, owner)

    def copy(self) -> Collected:
        """The same, to be added to without this one changing."""
        return Collected(
            self.rank, dict(self.items), dict(self.aliases), dict(self.documents), dict(self.own_documents)
        )

    def detach(self) -> None:
        """Replace every reference by a copy."""
        for key, item in self.items.items():
            copy = item.tensor.clone()
            self.items[key] = replace(item, tensor=copy, origin=copy)


_chunks: dict[Hashable, tuple[Shape, Shape]] = {}
"""A pure function of the keys: torch takes 50 us for it, and there are hundreds of tensors in each save."""


def local_chunk(tensor: torch.Tensor) -> tuple[Shape, Shape]:
    """Offsets and sizes of what this rank holds of a tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    key = (tensor.device_mesh, tensor.placements, tensor.shape)
    if key not in _chunks:
        chunks = tensor.__create_chunk_list__()
        whole = ((0,) * tensor.dim(), tuple(tensor.shape))
        _chunks[key] = (tuple(chunks[0].offsets), tuple(chunks[0].sizes)) if chunks else whole
    return _chunks[key]


def _item(key: str, tensor: torch.Tensor, sharing: Sharing, owner: int | None) -> Item:
    if tensor.is_meta:
        raise UnsupportedStateError(key, "the tensor is on the meta device: it has no values to save")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise UnsupportedStateError(key, f"tensor layout {tensor.layout} cannot be stored; make it dense")
    writes, local = True, tensor
    offsets, _ = local_chunk(tensor)
    if isinstance(tensor, DTensor):
        if sharing is Sharing.PER_RANK:
            raise UnsupportedStateError(key, "a DTensor is shared by all ranks and cannot be PerRank")
        with torch.no_grad():  # spares a DTensor on the way, 20 us
            sharing, writes, local = Sharing.SHARDED, _writes(key, tensor), tensor.to_local()
    dtype, shape = name_of(tensor.dtype, key), tuple(tensor.shape)
    return Item(local.detach(), dtype, shape, offsets, sharing, writes, tensor, owner)


def _writes(key: str, tensor: DTensor) -> bool:
    """Of the ranks that hold the same part, one writes it: a different one for different keys."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    for place, size, placement in zip(coordinate, tensor.device_mesh.shape, tensor.placements, strict=True):
        if placement.is_partial():
            raise UnsupportedStateError(key, "a DTensor with a pending reduction (Partial) has no values to save")
        if placement.is_replicate() and place != zlib.crc32(key.encode()) % size:
            return False
    return True
