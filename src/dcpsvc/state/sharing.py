"""How a value of the state is spread over the ranks, where it is not what a module or a tensor says by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from dcpsvc.errors import SharingError, UnsupportedStateError

Group = dist.ProcessGroup | DeviceMesh | list[int] | tuple[int, ...] | range
"""A process group or a mesh with this rank in it, or the global ranks."""

Validate = Literal["hash", "full", "off"]
"""How replicas are compared before they are written: by a hash of every byte, byte by byte, or not at all."""

Resize = Literal["by-rank", "strict", "reseed"] | Callable[[list[Any], int, int], Any]
"""What becomes of per-rank values when the number of ranks has changed; see :class:`PerRank`."""


def checked_resize(name: str, resize: Resize) -> Resize:
    """The policy, if it is one.

    Raises:
        SharingError: It is none.
    """
    if not callable(resize) and resize not in {"by-rank", "strict", "reseed"}:
        raise SharingError(name, f"resize={resize!r} must be 'by-rank', 'strict', 'reseed' or a function")
    return resize


class Declared:
    """A value with a declaration around it; declarations do not nest.

    Attributes:
        value: What was declared; a plain value is replaced here when it is loaded.
    """

    def __init__(self, value: Any) -> None:
        if isinstance(value, Declared):
            raise UnsupportedStateError(type(self).__name__, f"cannot wrap a {type(value).__name__}")
        self.value = value


class PerRank(Declared):
    """Declares that each rank has its own value: a data loader, a sampler, a metric that was not reduced yet.

    A restart with the same number of ranks gives each rank its own back.

    Args:
        value: A Stateful (``state_dict()`` / ``load_state_dict()``), a tensor, or a JSON-like value. A module is
            taken as a Stateful.
        resize: With another number of ranks. ``"by-rank"``: rank ``r`` takes the value of rank ``r % saved``; those of
            ranks that are gone are not loaded. ``"strict"``: the resume is refused. ``"reseed"``: the value stays as it
            is here, and its ``reseed(step, rank)`` is called if it has one. A function of the values of all saved ranks
            in their order, this rank, and the number of ranks now: what it returns is loaded.
    """

    def __init__(self, value: Any, resize: Resize = "by-rank") -> None:
        _refuse_optimizer(self, value)
        super().__init__(value)
        self.resize: Resize = checked_resize("PerRank", resize)


class Replicated(Declared):
    """Declares that all ranks hold the same, which is what anything not sharded is taken for; says how it is proven.

    Args:
        value: Anything a state may hold.
        validate: ``"hash"``: tensors are compared before each rank writes a share of them, and a diverged replica
            fails the save by name. ``"full"``: byte by byte, too, with rank 0's, which names the first element that
            differs; takes a copy of the tensors on each rank until that is done, and their bytes over the network.
            ``"off"``: only their dtypes and shapes are; ranks that differ give a mixture. Parts of sharded tensors
            that several ranks hold are compared by hash unless this is ``"off"``.
    """

    def __init__(self, value: Any, validate: Validate = "hash") -> None:
        if validate not in get_args(Validate):
            raise SharingError("Replicated", f"validate={validate!r} must be 'hash', 'full' or 'off'")
        super().__init__(value)
        self.validate: Validate = validate


class Cast(Declared):
    """Declares that a module is stored in another floating-point dtype: for checkpoints of the model alone, to look at.

    Cast while it is copied, so memory and files are as large as what is stored. Loading casts back; bits that the
    narrower dtype has not are lost. Integers, booleans and complex numbers stay as they are.

    Args:
        value: A module.
        dtype: ``torch.bfloat16``, ``torch.float16``, ``torch.float32`` or ``torch.float64``.
    """

    def __init__(self, value: Any, dtype: torch.dtype) -> None:
        if not isinstance(value, nn.Module):
            raise UnsupportedStateError("Cast", f"cannot wrap a {type(value).__name__}; give it a module")
        if dtype not in _FLOATS:
            raise SharingError("Cast", f"dtype={dtype!r} must be one of {', '.join(map(str, _FLOATS))}")
        super().__init__(value)
        self.dtype = dtype


_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class PerGroup(Declared):
    """Declares that the ranks of a group hold the same value, and other groups others.

    JSON values are written by every rank, of tensors each writes a share of the bytes. A rank takes over what the rank
    of its number had, wrapped around like :class:`PerRank`.

    Args:
        value: As for :class:`PerRank`.
        group: The process group, the mesh, or the global ranks; this rank must be one of them. The groups of all ranks
            have to divide the job: no rank is in two.

    Raises:
        SharingError: This rank is not in the group.
    """

    def __init__(self, value: Any, group: Group) -> None:
        _refuse_optimizer(self, value)
        super().__init__(value)
        self.ranks = ranks_of(group, "PerGroup")


class OneRank(Declared):
    """Declares that one rank alone has the value: only it saves it, and only it gets it back.

    Args:
        value: As for :class:`PerRank`; what the other ranks give is not looked at.
        rank: Which. It may be another one when the value is loaded.

    Raises:
        SharingError: The job has no such rank.
    """

    def __init__(self, value: Any, rank: int = 0) -> None:
        _refuse_optimizer(self, value)
        super().__init__(value)
        if type(rank) is not int or not 0 <= rank < world_size():
            raise SharingError("OneRank", f"rank={rank!r} is not in this job of {world_size()} ranks")
        self.rank = rank


class Part(Declared):
    """Declares that this rank has a part of a model, under names that no other part has: a pipeline stage.

    Each part is stored under the names of the whole model, so any other division into parts, or the whole model, loads
    it. The optimizer of a part is one by itself.

    Args:
        value: The module: its parameters bear the names they have in the whole model.
        group: The ranks that hold this same part, or shards of it, where there are several: what more than one holds
            alike is compared, and each writes a share; of buffers the first one's count. None: this rank alone, or the
            mesh of its DTensors.

    Attributes:
        ranks: All of them.
        holder: The first.

    Raises:
        SharingError: This rank is not in the group.
    """

    def __init__(self, value: Any, group: Group | None = None) -> None:
        if not isinstance(value, nn.Module):
            raise UnsupportedStateError("Part", f"cannot wrap a {type(value).__name__}; give it a module")
        super().__init__(value)
        self.ranks = (this_rank(),) if group is None else ranks_of(group, "Part")
        self.holder = self.ranks[0]


def bare(value: Any) -> Any:
    """What a declaration is about; the value itself where there is none."""
    return value.value if isinstance(value, Declared) else value


def this_rank() -> int:
    """The global rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Ranks of the job; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_of(group: Any, declaration: str) -> tuple[int, ...]:
    """The global ranks of a group, ascending.

    Raises:
        SharingError: This rank is not among them.
    """
    if isinstance(group, dist.ProcessGroup):
        ranks = tuple(sorted(dist.get_process_group_ranks(group)))
    elif isinstance(group, DeviceMesh):
        ranks = tuple(sorted(group.mesh.flatten().tolist()))
    elif isinstance(group, list | tuple | range):
        ranks = tuple(sorted({int(rank) for rank in group}))
    else:  # what new_group() gives to a rank outside, too
        raise SharingError(declaration, f"rank {this_rank()} is not in the group it was given; use this rank's own")
    if this_rank() not in ranks:
        raise SharingError(declaration, f"rank {this_rank()} is not in the group of ranks {ranks}; use this rank's own")
    return ranks


def _refuse_optimizer(declared: Declared, value: Any) -> None:
    if isinstance(value, Optimizer):
        kind = type(declared).__name__
        raise UnsupportedStateError(
            kind, "an optimizer is as its parameters are: give it to the state as it is, beside its module"
        )
