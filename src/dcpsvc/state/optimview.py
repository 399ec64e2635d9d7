"""An optimizer as the checkpoint knows it: over the model's parameters, whatever it was given in their place.

A ZeroRedundancyOptimizer keeps another inside, a container several, as torchtitan's does one for each part of a model;
FSDP1 gives pieces of parameters, or flat ones of which those are parts.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from dcpsvc.errors import StateMismatchError, UnsupportedStateError
from dcpsvc.state import fsdp1
from dcpsvc.state.ragged import Ragged

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.optim import Optimizer

    from dcpsvc.state.fsdp1 import Member

State = dict[torch.Tensor, dict[str, Any]]

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
"""Not imported here: whoever uses it has, and it brings TorchScript along."""


class View:
    """One optimizer at one moment, or several that are one component.

    Args:
        name: Of the component, for errors.
        optimizers: As :func:`unwrapped` has them.
        members: What FSDP1 manages, in all modules of the state.

    Attributes:
        param_groups: With the model's parameters. Not to be written to.
        parameters: Of all groups.
        is_divided: Each rank steps some of the parameters only, and has the state of those.
    """

    def __init__(self, name: str, optimizers: Sequence[Optimizer], members: Iterable[Member]) -> None:
        self._name, self._outer = name, tuple(optimizers)
        self._inner = tuple(map(_inner, optimizers))
        self.is_divided = any(one is not other for one, other in zip(self._outer, self._inner, strict=True))
        self._members: dict[int, list[Member]] = defaultdict(list)
        for member in members:
            self._members[id(member.given)].append(member)
        self._groups: list[dict[str, Any]] = [group for each in self._inner for group in each.param_groups]
        self.param_groups: list[dict[str, Any]] = [
            group | {"params": [part for given in group["params"] for part in self._parts(given)]}
            for group in self._groups
        ]
        self.parameters: list[torch.Tensor] = [p for group in self.param_groups for p in group["params"]]

    @property
    def is_own(self) -> bool:
        """Whether ranks have state of different parameters."""
        return self.is_divided or any(isinstance(p, Ragged) for p in self.parameters)

    def stepped(self, parameter: torch.Tensor) -> tuple[Optimizer, dict[str, Any]] | None:
        """The optimizer, and its group, that was given a parameter; None: none was given this very one."""
        pairs = ((each, group) for each in self._inner for group in each.param_groups)
        return next((pair for pair in pairs if any(one is parameter for one in pair[1]["params"])), None)

    @property
    def strange(self) -> list[Any]:
        """Whatever state is kept under that is no parameter."""
        known = {id(given) for group in self._groups for given in group["params"]}
        return [key for each in self._inner for key in each.state if id(key) not in known]

    @property
    def owners(self) -> dict[int, int | None]:
        """By ``id`` of a parameter, who alone changes it; see :func:`owner_of`."""
        return {
            id(part): owner_of(outer)
            for outer, inner in zip(self._outer, self._inner, strict=True)
            for group in inner.param_groups
            for given in group["params"]
            for part in self._parts(given)
        }

    @property
    def state(self) -> State:
        """What there is, by parameter, references only."""
        found: State = {}
        for given, entries in ((p, entries) for each in self._inner for p, entries in each.state.items()):
            if id(given) not in self._members:
                found[given] = entries
            for member in self._members.get(id(given), ()):
                if member.ragged.local.numel():
                    found[member.ragged] = {name: _cut(member, value) for name, value in entries.items()}
        return found

    def wanted(self) -> list[torch.Tensor]:
        """The parameters whose state this rank is to have: of the others it has no element."""
        found: list[torch.Tensor] = []
        for group in self._groups:
            for given in group["params"]:
                parts = self._parts(given)
                here = [p for p in parts if not isinstance(p, Ragged) or p.local.numel()]
                found += here or (parts[:1] if fsdp1.is_flat(given) else [])  # it has counters, if nothing else
        return found

    def put(self, state: State) -> None:
        """Replace all state.

        Raises:
            StateMismatchError: Parameters that are one for the optimizer have counters that differ; nothing is changed.
        """
        new = {given: value for given, value in state.items() if not isinstance(given, Ragged)}
        for given in (p for group in self._groups for p in group["params"]):
            parts = [(m, state[m.ragged]) for m in self._members.get(id(given), ()) if m.ragged in state]
            if parts and fsdp1.is_flat(given):
                new[given] = self._joined(given, parts)
            elif parts:
                new[given] = {name: _uncut(parts[0][0], value) for name, value in parts[0][1].items()}
        for each in self._inner:
            mine = [p for group in each.param_groups for p in group["params"]]
            each.state.clear()
            each.state.update({p: new[p] for p in mine if p in new})

    def set_hyperparameters(self, index: int, values: Mapping[str, Any]) -> None:
        """Of a group, in place."""
        outer = [group for each in self._outer for group in each.param_groups]
        for group in (self._groups[index], outer[index], self.param_groups[index]):
            group.update(values)

    def _parts(self, given: torch.Tensor) -> list[torch.Tensor]:
        members = self._members.get(id(given))
        return [given] if members is None else [member.ragged for member in members]

    def _joined(self, given: torch.Tensor, parts: Sequence[tuple[Member, Mapping[str, Any]]]) -> dict[str, Any]:
        """State of a flat parameter; elements of which nothing was saved, and padding, are zero, as FSDP1 has them."""
        joined: dict[str, Any] = {}
        for member, entries in parts:
            for name, value in entries.items():
                if isinstance(value, Ragged):
                    whole = joined.setdefault(name, given.new_zeros(given.numel(), dtype=value.dtype))
                    whole[member.at : member.at + value.local.numel()] = value.local
                elif not _same(joined.setdefault(name, value), value):
                    key = f"{self._name}.state.{member.name}.{name}"
                    reason = "differs from that of others in its flat parameter; use_orig_params=True keeps them apart"
                    raise StateMismatchError(key, reason)
        return joined


def unwrapped(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers in what a library puts around them: those whose hooks are called, and which have the state."""
    return [each for one in held for each in unwrapped(one)] if (held := _held(optimizer)) else [optimizer]


def layers(optimizer: Optimizer) -> list[Optimizer]:
    """It, and those that it holds, and those that these hold; a ZeroRedundancyOptimizer as what is inside it."""
    return [_inner(optimizer), *(one for each in _held(optimizer) for one in layers(each))]


def refuse_own_state(name: str, optimizer: Optimizer) -> None:
    """What is put around optimizers is not saved, so that must be no state: the slow weights of a Lookahead, say.

    Args:
        name: Of the component, for errors.
        optimizer: As it was given.

    Raises:
        UnsupportedStateError: It, or one that it holds, holds others and has state which is not theirs.
    """
    held = _held(optimizer)
    for one in held:
        refuse_own_state(name, one)
    own = cast("Any", getattr(optimizer, "state", None))
    if not held or not isinstance(own, Mapping) or any(own is one.state for one in held):
        return
    if any(all(one.state.get(key) is not entries for one in held) for key, entries in own.items()):
        reason = "has state of its own beside the optimizers that it holds, which would not be saved"
        raise UnsupportedStateError(
            name, f"{type(optimizer).__name__} {reason}; give those it holds, and that state as a value of its own"
        )


def _held(optimizer: Optimizer) -> list[Optimizer]:
    inner = getattr(optimizer, "optimizer", None)
    several = [inner] if inner is not None else getattr(optimizer, "optimizers", None)
    found: list[Any] = list(several) if isinstance(several, list | tuple) else []
    return found if all(isinstance(each, torch.optim.Optimizer) for each in found) else []


def owner_of(optimizer: Optimizer) -> int | None:
    """Who alone changes its parameters and state, and waits; None: a CUDA graph may, too, which calls no hook."""
    return None if any(group.get("capturable") for group in optimizer.param_groups) else id(optimizer)


def _inner(optimizer: Any) -> Optimizer:
    kind = getattr(sys.modules.get(_ZERO), "ZeroRedundancyOptimizer", None)
    found: Optimizer = optimizer.optim if kind and isinstance(optimizer, kind) else optimizer
    return found


def _cut(member: Member, value: Any) -> Any:
    """What of a state tensor belongs to a parameter; what is no element for element is for all of it."""
    here = member.given.numel() if fsdp1.is_flat(member.given) else member.ragged.local.numel()
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.numel() != here:
        return value
    return member.ragged.like(value.view(-1)[member.at : member.at + member.ragged.local.numel()])


def _uncut(member: Member, value: Any) -> Any:
    if not isinstance(value, Ragged):
        return value
    return value.local.view(member.given.shape) if value.local.numel() == member.given.numel() else value.local


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one.cpu(), other.cpu())
    return bool(one == other)
