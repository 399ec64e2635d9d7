"""A checkpoint as the components see it when they load: documents, and tensors they may ask for."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from dcpsvc.errors import StateMismatchError
from dcpsvc.format.shardfile import INNER
from dcpsvc.state.chunks import local_chunk
from dcpsvc.state.drift import Drift, Terms, described
from dcpsvc.state.dtypes import dtype_of
from dcpsvc.state.ragged import Ragged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from dcpsvc.format.layout import Layout, Shape, Tensor

_LARGE_NBYTES = 1 << 20
_ASKED_AT_ONCE = 16
"""Ranks asked for what they had of their own where the first may do: as many as are read side by side from afar."""


@dataclass(frozen=True, slots=True)
class Want:
    """A box of a saved tensor that this rank needs, into ``out``: a contiguous host tensor of that size."""

    key: str
    offsets: Shape
    out: torch.Tensor
    live: bool = False
    """``out`` is memory of the state itself: not to be written to before everything is proven on every rank."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint offers to one rank.

    Attributes:
        layout: Every tensor.
        documents: The shared JSON values, and those of the rank whose own values this rank takes over.
        rank: This rank, now.
        world_size: Ranks that wrote the checkpoint.
        step: Its training step.
        ranks: How many there are now; 0: as many as wrote it.
        documents_of: Gives the JSON values in the shards of ranks that wrote the checkpoint; several are read side by
            side, and each once.
        terms: What the user asked to be let pass.
        drift: Where what is wanted and what was saved differ, as far as was looked.
        bases: What this rank says about what of the modules is not saved, by component.
    """

    layout: Layout
    documents: Mapping[str, Any]
    rank: int
    world_size: int
    step: int
    ranks: int = 0
    documents_of: Callable[..., Mapping[str, Any]] | None = None
    terms: Terms = field(default_factory=Terms)
    drift: Drift = field(default_factory=Drift)
    bases: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def source_rank(self) -> int:
        """Whose per-rank values this rank takes over: its own, wrapped around if the job grew."""
        return self.rank % self.world_size

    @property
    def resized(self) -> bool:
        """Whether there are more or fewer ranks than wrote the checkpoint."""
        return self.ranks not in {0, self.world_size}

    def has(self, component: str) -> bool:
        """Whether the checkpoint holds anything of that name."""
        name = self.saved_name(component)
        return name in self.documents or own_name(name, self.source_rank) in self.documents

    def saved_name(self, key: str) -> str:
        """What a key of the state is called in the checkpoint."""
        return self.terms.saved_name(key)

    def document(self, component: str) -> Any:
        """A component's document."""
        name = self.saved_name(component)
        if name not in self.documents:
            raise StateMismatchError(name, "the checkpoint holds nothing of that name")
        return self.documents[name]

    def tensor(self, key: str) -> Tensor:
        """A saved tensor's description."""
        found = self.layout.find(key)
        if found is None:
            raise StateMismatchError(key, "the checkpoint holds no such tensor")
        return found

    def own_documents(self, component: str) -> Iterator[Any]:
        """What the ranks that wrote the checkpoint had of a component of their own: this rank's source first.

        The others are asked, some side by side, when those before did not do.
        """
        name, source = self.saved_name(component), self.source_rank
        asked, left = [source], [rank for rank in range(self.world_size) if rank != source]
        while asked:
            yield from (found for found in self.documents_by_rank(name, asked) if found is not None)
            asked, left = left[:_ASKED_AT_ONCE], left[_ASKED_AT_ONCE:]

    def documents_by_rank(self, name: str, ranks: Sequence[int]) -> list[Any]:
        """What each of these ranks, that wrote the checkpoint, had under a name of its own; None of who had nothing.

        Raises:
            CorruptShardError: Of the first of them whose shard is damaged; names it.
            StoreError: A store did not answer.
        """
        said = self.documents if self.documents_of is None else self.documents_of(*ranks)
        return [said.get(own_name(name, rank)) for rank in ranks]

    def document_of(self, rank: int, name: str) -> Any:
        """Likewise, of one."""
        return self.documents_by_rank(name, [rank])[0]

    def record(self, key: str, names: Iterable[str] = ()) -> dict[str, Any] | None:
        """What a tensor was that is stored as those inside it; None if it is not.

        Args:
            key: In the checkpoint.
            names: Of some inside, if they are known: who wrote them has written that down, too.

        Raises:
            StateMismatchError: That is malformed.
        """
        first = (next(iter(found.chunks), None) for name in names if (found := self.layout.find(name)))
        for rank in dict.fromkeys([self.source_rank, *(chunk.rank for chunk in first if chunk)]):
            of_rank = self.document_of(rank, INNER)
            if isinstance(of_rank, dict) and key in of_rank:
                return _checked(key, of_rank[key])
        return None

    def want_like(self, key: str, template: torch.Tensor, *, saved_key: str = "", cast: bool = False) -> list[Want]:
        """Ask for what this rank holds of ``template``; where it differs in shape or dtype that is noted instead.

        Args:
            key: Of the state.
            template: As the state has it.
            saved_key: Its name in the checkpoint, where that is not what ``rename`` makes of the key.
            cast: Any floating-point dtype will do.
        """
        theirs = saved_key or self.saved_name(key)
        saved = self.layout.find(theirs)
        if self.terms.skips(key):
            return []
        if saved is None:
            self.drift.add(key, "missing", "-", described(template))
        elif tuple(template.shape) != saved.shape:
            self.drift.add(key, "shape", self.described(theirs), described(template))
        elif template.dtype != dtype_of(saved.dtype) and not (cast and dtype_of(saved.dtype).is_floating_point):
            self.drift.add(key, "dtype", self.described(theirs), described(template))
        else:
            return [self.want_box(theirs, *local_chunk(template))]
        return []

    def described(self, saved_key: str) -> str:
        """Dtype and shape of a saved tensor, for people."""
        found = self.tensor(saved_key)
        return f"{str(dtype_of(found.dtype)).removeprefix('torch.')}{list(found.shape)}"

    def want_in_place(self, key: str, template: torch.Tensor, *, saved_key: str = "", cast: bool = False) -> list[Want]:
        """Likewise, into the memory of ``template`` where that can be written to as it is."""
        return [into(want, template) for want in self.want_like(key, template, saved_key=saved_key, cast=cast)]

    def want_whole(self, key: str) -> Want:
        """Ask for a whole tensor, by its name in the checkpoint."""
        shape = self.tensor(key).shape
        return self.want_box(key, (0,) * len(shape), shape)

    def want_box(self, key: str, offsets: Shape, sizes: Shape) -> Want:
        """Ask for a box of a tensor, by its name in the checkpoint."""
        return Want(key, offsets, torch.empty(sizes, dtype=dtype_of(self.tensor(key).dtype), device="cpu"))


class Component(Protocol):
    """One named part of the state. Every method is called on the training thread."""

    def collect(self, into: Any) -> None:
        """Give references to tensors and copies of everything else; may not wait for a peer."""
        ...

    def wants(self, saved: Saved) -> list[Want]:
        """Say what to read. Changes nothing; notes in ``saved.drift`` which keys do not fit.

        Raises:
            StateMismatchError: The checkpoint does not fit at all.
        """
        ...

    def apply(self, saved: Saved, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what was read; ``tensors`` are those asked for, verified."""
        ...


def into(want: Want, template: torch.Tensor) -> Want:
    """The same, into the memory of ``template`` where that can be written to as it is."""
    if isinstance(template, Ragged):
        return want
    local = (template.to_local() if isinstance(template, DTensor) else template).detach()
    if type(local) is not torch.Tensor or local.device.type != "cpu" or not local.is_contiguous():
        return want
    return replace(want, out=local, live=True) if _fits(local, want.out) else want


def _fits(here: torch.Tensor, wanted: torch.Tensor) -> bool:
    return here.shape == wanted.shape and here.dtype == wanted.dtype


def _checked(key: str, record: Any) -> dict[str, Any]:
    kinds = {"class": str, "inner": dict, "dtype": str, "shape": list}
    if not isinstance(record, dict) or any(not isinstance(record.get(name), kind) for name, kind in kinds.items()):
        raise StateMismatchError(key, f"the checkpoint says of it {record!r:.80}, which is not understood")
    return record


def own_name(component: str, rank: int) -> str:
    """Name of a component's values that belong to one rank alone."""
    return f"{component}@{rank}"


def copy_into(target: torch.Tensor, loaded: torch.Tensor) -> None:
    """Overwrite the local part of ``target``; of a ragged one, with what the box around it has."""
    local = target.to_local() if isinstance(target, DTensor) else target
    if isinstance(target, Ragged):
        local, loaded = target.local, target.picked(loaded)
    if loaded.data_ptr() == local.data_ptr() and loaded.device == local.device:
        return  # it was read in place
    if loaded.nbytes >= _LARGE_NBYTES and _alike(local, loaded):
        # All of torch's threads would take part, and wait for one another where the processors are busy.
        ctypes.memmove(local.data_ptr(), loaded.data_ptr(), loaded.nbytes)
        torch.autograd.graph.increment_version(local)
        return
    with torch.no_grad():
        local.copy_(loaded)


def _alike(here: torch.Tensor, loaded: torch.Tensor) -> bool:
    """Whether they have the same bytes in the same order, on the host."""
    plain = all(type(one) in {torch.Tensor, torch.nn.Parameter} and one.device.type == "cpu" for one in (here, loaded))
    return plain and _fits(here, loaded) and all(one.is_contiguous() for one in (here, loaded))


def like(template: torch.Tensor | None, loaded: torch.Tensor) -> torch.Tensor:
    """``loaded`` as a tensor of the template's kind: its device, and its mesh where it is a DTensor."""
    if template is None:
        return loaded
    local = loaded.to(template.device)
    if isinstance(template, Ragged):
        return template.like(template.picked(local).clone())
    if not isinstance(template, DTensor):
        return local
    return DTensor.from_local(
        local,
        template.device_mesh,
        template.placements,
        run_check=False,
        shape=template.size(),
        stride=template.stride(),
    )
