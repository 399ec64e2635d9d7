"""One rank's part of the state at one step: tensors by reference, documents by value, and what they claim."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch.distributed.tensor import DTensor

from dcpsvc.errors import StateError, UnsupportedStateError
from dcpsvc.state import inner, meshes
from dcpsvc.state.chunks import local_chunk
from dcpsvc.state.dtypes import name_of
from dcpsvc.state.ragged import Ragged

if TYPE_CHECKING:
    from dcpsvc.format.layout import Shape
    from dcpsvc.state.sharing import Validate


class Sharing(StrEnum):
    """Who holds a tensor, so who writes it."""

    SHARDED = "sharded"
    """Each rank holds a part (DTensor, FSDP1)."""
    REPLICATED = "replicated"
    """All ranks hold the same; verified equal, then each writes a share of the bytes."""
    FIRST = "first"
    """Rank 0's counts, whatever the others hold: module buffers, as DDP broadcasts them."""
    PER_RANK = "per-rank"
    """Each rank holds its own: the key carries the rank, or is one that no other rank has."""


class Item(NamedTuple):
    """A tensor of the state as this rank holds it. One is made for each tensor in every save.

    Attributes:
        tensor: The local part, not a copy.
        dtype: Safetensors name of what is stored; the tensor's own may be another.
        shape: Of the whole tensor.
        offsets: Where the local part begins in it; of a ragged one, in the flat tensor.
        sharing: Who holds it.
        writes: Whether what this rank holds is written by those that hold it, or by others who hold the whole too.
        origin: What training writes to, as far as torch counts writes: the DTensor around a local part.
        owner: ``id`` of the optimizer that alone changes it; None: anybody may, at any time.
        validate: How replicas are compared before each writes a share.
        alike: Of a tensor not all ranks hold alike: the ranks that hold this very part, if there are several. Each
            writes a share.
        compared: Those whose parts must be the same: they, and the ranks of meshes beside theirs, which write nothing.
    """

    tensor: torch.Tensor
    dtype: str
    shape: Shape
    offsets: Shape
    sharing: Sharing
    writes: bool
    origin: torch.Tensor
    owner: int | None = None
    validate: Validate = "hash"
    alike: Shape = ()
    compared: Shape = ()

    @property
    def is_ragged(self) -> bool:
        """Whether ``tensor`` is 1-D, and consecutive elements of a whole that is not."""
        return len(self.offsets) != len(self.shape)

    @property
    def claim(self) -> str:
        """What every rank must agree on."""
        return _claim(self.dtype, self.shape, self.sharing, self.validate)


class _How(TypedDict):
    """As the parameters of :meth:`Collected._put`."""

    holder: int
    writes: bool
    owner: int | None
    validate: Validate
    alike: Shape


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
        bases: What this rank says about what of the modules is not saved, by component.
        wrappers: Of each tensor that is stored as those inside it, what it is.
        agreed: What of that every rank must say, by key.
    """

    rank: int
    items: dict[str, Item] = field(default_factory=dict[str, Item])
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    documents: dict[str, Any] = field(default_factory=dict[str, Any])
    own_documents: dict[str, Any] = field(default_factory=dict[str, Any])
    owners: dict[int, int] = field(default_factory=dict[int, int])
    bases: dict[str, Any] = field(default_factory=dict[str, Any])
    wrappers: dict[str, Any] = field(default_factory=dict[str, Any])
    agreed: dict[str, str] = field(default_factory=dict[str, str])

    def add(
        self,
        key: str,
        tensor: torch.Tensor,
        sharing: Sharing,
        *,
        owner: int | None = None,
        validate: Validate = "hash",
        stored: torch.dtype | None = None,
    ) -> None:
        """Take a tensor in; one of which ranks hold parts is sharded whatever ``sharing`` says.

        Args:
            key: Its name.
            tensor: By reference.
            sharing: Who holds it.
            owner: ``id`` of the optimizer that alone changes it.
            validate: How replicas are compared.
            stored: The dtype in the file, where it is another one.
        """
        if type(tensor) not in inner.PLAIN and isinstance(tensor, DTensor | Ragged):
            sharing = Sharing.SHARDED
        self._put(key, tensor, sharing, writes=True, owner=owner, validate=validate)
        self._store_as(key, stored)

    def add_part(
        self,
        key: str,
        tensor: torch.Tensor,
        holder: int,
        *,
        owner: int | None = None,
        alike: Shape = (),
        stored: torch.dtype | None = None,
    ) -> None:
        """Take a tensor in that only some ranks know of: those that hold a part of it, or all of it.

        Args:
            key: The name in the whole that no other part has.
            tensor: A DTensor is cut as its mesh says.
            holder: Whose value counts, where nobody holds the same; of DTensors, whose mesh.
            owner: ``id`` of the optimizer that alone changes it.
            alike: The ranks that hold the same, if it is no DTensor.
            stored: The dtype in the file, where it is another one.
        """
        writes = self.rank in (alike or (holder,))
        self._put(key, tensor, Sharing.PER_RANK, holder=holder, writes=writes, owner=owner, alike=alike)
        self._store_as(key, stored)

    def add_value(self, key: str, tensor: torch.Tensor, alike: Shape) -> None:
        """Take a tensor in that a rank has, or that some have alike.

        Args:
            key: Carries a rank.
            tensor: No DTensor.
            alike: Ranks.
        """
        if isinstance(tensor, DTensor | Ragged):
            raise UnsupportedStateError(key, "a sharded tensor is shared by ranks and cannot be the value of one")
        self._put(key, tensor, Sharing.PER_RANK, writes=True, owner=None, alike=alike)

    def _store_as(self, key: str, dtype: torch.dtype | None) -> None:
        if dtype is not None and key in self.items:
            self.items[key] = self.items[key]._replace(dtype=name_of(dtype, key))

    def add_alias(self, key: str, tensor: torch.Tensor, of: str) -> bool:
        """Give a tensor a further name; False: it has none but its own, for other ranks would not know of that."""
        if not inner.is_wrapper(tensor):
            self.aliases[key] = of
            return True
        if of not in self.wrappers or isinstance(tensor, DTensor):
            return False
        self.wrappers[key] = self.wrappers[of]
        names = zip(*(inner.parts(name, tensor, self.rank) for name in (key, of)), strict=True)
        self.aliases |= dict(names)
        return True

    def _put(
        self,
        key: str,
        tensor: torch.Tensor,
        sharing: Sharing,
        *,
        holder: int = 0,
        writes: bool,
        owner: int | None,
        validate: Validate = "hash",
        alike: Shape = (),
    ) -> None:
        if key in self.items or key in self.aliases or key in self.wrappers:
            raise StateError(key, "two tensors of the state would have this name")
        if inner.is_wrapper(tensor):
            how: _How = {"holder": holder, "writes": writes, "owner": owner, "validate": validate, "alike": alike}
            self._put_parts(key, tensor, sharing, how)
            return
        local = origin = tensor
        shape: Shape = tuple(tensor.shape)
        compared: Shape = ()
        offsets: Shape = (0,) * len(shape)
        if isinstance(tensor, DTensor):
            _check_reduced(key, tensor)
            offsets, _ = local_chunk(tensor)
            mesh, placements = tensor.device_mesh, tensor.placements
            alike, writes = meshes.alike(mesh, placements, self.rank), meshes.is_in(mesh, holder)
            writes = writes and bool(alike)
            if sharing is Sharing.SHARDED:  # of one part of a model, the meshes beside it may have another part
                compared = meshes.alike_beside(mesh, placements, self.rank)
            with torch.no_grad():  # spares a DTensor on the way, 20 us
                local = tensor.to_local()
        elif isinstance(tensor, Ragged):
            local, origin = tensor.local, tensor.origin
            if inner.is_wrapper(local):
                reason = f"a {type(local).__name__} cannot be stored of what FSDP1 has flattened"
                raise UnsupportedStateError(key, f"{reason}; use fully_shard (FSDP2)")
            offsets, writes = (tensor.begin,), tensor.holders.count(holder)
            alike = tensor.holders.alike
        _check_storable(key, local)
        dtype = name_of(tensor.dtype, key)
        alike = alike if len(alike) > 1 else ()
        compared = compared if len(compared) > 1 else alike
        self.items[key] = Item(
            local.detach(), dtype, shape, offsets, sharing, writes, origin, owner, validate, alike, compared
        )

    def _put_parts(self, key: str, tensor: torch.Tensor, sharing: Sharing, how: _How) -> None:
        """What is inside, each as the outer one would be; of a DTensor, as values of those that hold the same part."""
        _check_storable(key, tensor)
        found = self.wrappers[key] = inner.record(key, tensor)
        if sharing is not Sharing.PER_RANK:
            self.agreed[key] = inner.claim(found)
        if isinstance(tensor, DTensor):
            _check_reduced(key, tensor)
            sharing = Sharing.PER_RANK
            how["writes"] = True
            how["alike"] = meshes.alike(tensor.device_mesh, tensor.placements, self.rank)
        for name, part in inner.parts(key, tensor, self.rank).items():
            is_shared = isinstance(part, DTensor) and sharing is not Sharing.PER_RANK
            self._put(name, part, Sharing.SHARDED if is_shared else sharing, **how)

    def copy(self) -> Collected:
        """The same, to be added to without this one changing."""
        found = Collected(
            self.rank, dict(self.items), dict(self.aliases), dict(self.documents), dict(self.own_documents)
        )
        found.wrappers, found.agreed = dict(self.wrappers), dict(self.agreed)
        return found

    def detach(self) -> None:
        """Replace every reference by a copy."""
        for key, item in self.items.items():
            copy = item.tensor.clone()
            self.items[key] = item._replace(tensor=copy, origin=copy)


@functools.lru_cache(maxsize=1024)
def _claim(dtype: str, shape: Shape, sharing: Sharing, validate: Validate) -> str:
    """Of few kinds there are many: writing the shape down takes longer than to look it up."""
    return f"{dtype}{list(shape)} {sharing}{' in full' if validate == 'full' else ''}"


def _check_storable(key: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise UnsupportedStateError(key, "the tensor is on the meta device: it has no values to save")
    if tensor.is_quantized:
        reason = "a quantized tensor of torch.ao cannot be stored; store its int_repr(), scale and zero point"
        raise UnsupportedStateError(key, reason)
    if tensor.layout is not torch.strided:
        raise UnsupportedStateError(key, f"tensor layout {tensor.layout} cannot be stored; make it dense")


def _check_reduced(key: str, tensor: DTensor) -> None:
    if any(placement.is_partial() for placement in tensor.placements):
        raise UnsupportedStateError(key, "a DTensor with a pending reduction (Partial) has no values to save")
