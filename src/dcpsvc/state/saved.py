"""A checkpoint as the components see it when they load: documents, and tensors they may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from dcpsvc.errors import StateMismatchError
from dcpsvc.state.collected import local_chunk
from dcpsvc.state.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcpsvc.format.layout import Layout, Shape, Tensor


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
    """

    layout: Layout
    documents: Mapping[str, Any]
    rank: int
    world_size: int
    step: int

    @property
    def source_rank(self) -> int:
        """Whose per-rank values this rank takes over: its own, wrapped around if the job grew."""
        return self.rank % self.world_size

    def has(self, component: str) -> bool:
        """Whether the checkpoint holds anything of that name."""
        return component in self.documents or own_name(component, self.source_rank) in self.documents

    def document(self, name: str) -> Any:
        """A component's document."""
        if name not in self.documents:
            raise StateMismatchError(name, "the checkpoint holds nothing of that name")
        return self.documents[name]

    def tensor(self, key: str) -> Tensor:
        """A saved tensor's description."""
        found = self.layout.find(key)
        if found is None:
            raise StateMismatchError(key, "the checkpoint holds no such tensor")
        return found

    def want_like(self, key: str, template: torch.Tensor) -> Want:
        """Ask for what this rank holds of ``template``, which must have the saved shape and dtype."""
        saved = self.tensor(key)
        if tuple(template.shape) != saved.shape:
            raise StateMismatchError(key, f"saved with shape {list(saved.shape)}, here it is {list(template.shape)}")
        if template.dtype != dtype_of(saved.dtype):
            raise StateMismatchError(key, f"saved as {dtype_of(saved.dtype)}, here it is {template.dtype}")
        return self.want_box(key, *local_chunk(template))

    def want_in_place(self, key: str, template: torch.Tensor) -> Want:
        """Likewise, into the memory of ``template`` where that can be written to as it is."""
        if template.device.type == "meta":
            raise StateMismatchError(key, "it is on the meta device; call to_empty(device=...) on its module before")
        want = self.want_like(key, template)
        local = (template.to_local() if isinstance(template, DTensor) else template).detach()
        if type(local) is not torch.Tensor or local.device.type != "cpu" or not local.is_contiguous():
            return want
        return Want(key, want.offsets, local, live=True) if local.shape == want.out.shape else want

    def want_whole(self, key: str) -> Want:
        """Ask for a whole tensor."""
        shape = self.tensor(key).shape
        return self.want_box(key, (0,) * len(shape), shape)

    def want_box(self, key: str, offsets: Shape, sizes: Shape) -> Want:
        """Ask for a box."""
        return Want(key, offsets, torch.empty(sizes, dtype=dtype_of(self.tensor(key).dtype)))


class Component(Protocol):
    """One named part of the state. Every method is called on the training thread."""

    def collect(self, into: Any) -> None:
        """Give references to tensors and copies of everything else; may not wait for a peer."""
        ...

    def wants(self, saved: Saved) -> list[Want]:
        """Say what to read. Changes nothing.

        Raises:
            StateMismatchError: The checkpoint does not fit.
        """
        ...

    def apply(self, saved: Saved, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what was read; ``tensors`` are those asked for, verified."""
        ...


def own_name(component: str, rank: int) -> str:
    """Name of a component's values that belong to one rank alone."""
    return f"{component}@{rank}"


def copy_into(target: torch.Tensor, loaded: torch.Tensor) -> None:
    """Overwrite the local part of ``target``."""
    local = target.to_local() if isinstance(target, DTensor) else target
    if loaded.data_ptr() == local.data_ptr() and loaded.device == local.device:
        return  # it was read in place
    with torch.no_grad():
        local.copy_(loaded)


def like(template: torch.Tensor | None, loaded: torch.Tensor) -> torch.Tensor:
    """``loaded`` as a tensor of the template's kind: its device, and its mesh where it is a DTensor."""
    if template is None:
        return loaded
    local = loaded.to(template.device)
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
