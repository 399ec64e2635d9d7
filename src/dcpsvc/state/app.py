"""The user's mapping of names to objects, as components in the order they must be handled."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from dcpsvc.errors import ConfigError, SharingError
from dcpsvc.format import peft
from dcpsvc.format.shardfile import INNER
from dcpsvc.state import origin
from dcpsvc.state.collected import Collected
from dcpsvc.state.metrics import has_metrics
from dcpsvc.state.module import ModuleComponent
from dcpsvc.state.optimizer import OptimizerComponent
from dcpsvc.state.optimview import owner_of, unwrapped
from dcpsvc.state.saved import own_name
from dcpsvc.state.sharing import Cast, Part, Replicated, bare
from dcpsvc.state.values import ValueComponent, is_stateful
from dcpsvc.state.wrappers import Names, unwrap

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

    import torch

    from dcpsvc.state.drift import Terms
    from dcpsvc.state.module import Only
    from dcpsvc.state.saved import Component, Saved, Want

_NAME = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_-]*")


class AppState:
    """Everything one Checkpointer saves and restores.

    Args:
        state: Names to objects. Read anew at each save, so values may be replaced.
        only: Which parameters of the modules.
    """

    def __init__(self, state: MutableMapping[str, Any], only: Only = "all") -> None:
        if not state:
            raise ConfigError("the state is empty: there is nothing to save")
        for name in state:
            if not _NAME.fullmatch(str(name)):
                raise ConfigError(f"state name {name!r}: use letters, digits, '_' and '-', and no '__' in front")
        self._state = state
        self._only: Only = only
        self._known: tuple[tuple[tuple[str, int], ...], dict[str, Component]] = ((), {})
        self.components()

    def check_module(self, name: str) -> None:
        """That a name, or what is before its first dot, is a module's, and a folder of its adapters could be made.

        Raises:
            ConfigError: It is not, or an adapter of it has a name that could not be a directory.
        """
        component = name.split(".", 1)[0]
        value = self._state.get(component)
        if not _is_module(value):
            there = ", ".join(name for name, value in self._state.items() if _is_module(value)) or "none"
            raise ConfigError(f"adapter_folder={name!r}: the state has no such module; there are: {there}")
        module = unwrap(bare(value))
        if bad := peft.misnamed(name, origin.described(module, Names(module))):
            raise ConfigError(
                f"adapter_folder={name!r}: the adapter {bad[0]!r} would be a directory of that name; {peft.REMEDY}"
            )

    @property
    def mapping(self) -> MutableMapping[str, Any]:
        """What the user gave, with what loading put into it."""
        return self._state

    def components(self) -> dict[str, Component]:
        """Modules first: reading one puts FSDP2 back into its sharded form, which optimizers rely on."""
        identity = tuple((name, id(value)) for name, value in self._state.items())
        if self._known[0] != identity:
            self._known = (identity, self._make_components())
        return self._known[1]

    def _module(self, name: str, value: Any) -> ModuleComponent:
        """The one there was, if it is of the same: it knows what of the module has changed."""
        known = self._known[1].get(name)
        if isinstance(known, ModuleComponent) and known.given is value:
            return known
        return ModuleComponent(name, value, self._only)

    def _optimizer(self, name: str, value: Any, modules: Sequence[ModuleComponent]) -> OptimizerComponent:
        """Likewise: it knows what was seen beside the state of the optimizer, and said."""
        known = self._known[1].get(name)
        if isinstance(known, OptimizerComponent) and known.is_of(value, modules):
            return known
        return OptimizerComponent(name, value, modules)

    def _make_components(self) -> dict[str, Component]:
        _check_claimed_once(self._state)
        modules = {name: self._module(name, v) for name, v in self._state.items() if _is_module(v)}
        found: dict[str, Component] = dict(modules)
        for name, value in self._state.items():
            if isinstance(bare(value), Optimizer):
                found[name] = self._optimizer(name, value, list(modules.values()))
            elif name not in modules:
                found[name] = ValueComponent(name, self._state)
        return found

    def collect(self, rank: int, *, values: Collected | None = None) -> Collected:
        """References to every tensor and copies of everything else, as of now.

        Args:
            rank: This rank.
            values: As :meth:`collect_values` gave it earlier; used instead of the values of now.
        """
        collected = values or Collected(rank)
        collected.owners = self._owners()
        for component in self.components().values():
            if values is None or not isinstance(component, ValueComponent):
                component.collect(collected)
        if collected.wrappers:
            collected.own_documents[own_name(INNER, rank)] = collected.wrappers
        return collected

    def collect_values(self, rank: int, *, max_nbytes: int) -> Collected | None:
        """Copies of everything that is neither module nor optimizer; None if their tensors are larger than that."""
        collected = Collected(rank)
        for component in self.components().values():
            if isinstance(component, ValueComponent):
                component.collect(collected)
        if sum(item.tensor.nbytes for item in collected.items.values()) > max_nbytes:
            return None
        collected.detach()
        return collected

    def chosen(self, saved: Saved) -> dict[str, Component]:
        """The components to load. One that the checkpoint lacks is noted, or let pass where the terms say so.

        Raises:
            ConfigError: The terms name something that is not in the state, or are impossible.
        """
        components = self.components()
        self._check_terms(components, saved.terms)
        chosen: dict[str, Component] = {}
        for name, component in components.items():
            if name in saved.terms.skip:
                continue
            if saved.has(name):
                chosen[name] = component
            else:
                saved.drift.add(name, "missing", "-", f"a component; skip=[{name!r}] starts without it")
        return chosen

    def _owners(self) -> dict[int, int]:
        found: dict[int, int | None] = {}
        for optimizer in self.optimizers():
            owner = owner_of(optimizer)
            for parameter in (each for group in optimizer.param_groups for each in group["params"]):
                if found.setdefault(id(parameter), owner) != owner:
                    found[id(parameter)] = None
        return {parameter: owner for parameter, owner in found.items() if owner is not None}

    def _check_terms(self, components: Mapping[str, Component], terms: Terms) -> None:
        for key in terms.skip:
            name, _, rest = key.partition(".")
            if name not in components:
                raise ConfigError(f"skip={key!r} is not in the state, which has {', '.join(components)}")
            if rest and isinstance(components[name], ValueComponent):
                raise ConfigError(
                    f"skip={key!r}: {name} is loaded whole or not at all; skip={name!r} leaves it as it is"
                )
        for key in terms.rename.values():
            if key.partition(".")[0] not in components:
                raise ConfigError(f"rename to {key!r}: not in the state, which has {', '.join(components)}")

    def optimizers(self) -> list[Optimizer]:
        """Every optimizer of the state."""
        given = [target for value in self._state.values() if isinstance(target := bare(value), Optimizer)]
        return [each for one in given for each in unwrapped(one)]

    def versions(self) -> tuple[int, ...]:
        """Changes when a module was written to other than by an optimizer of the state."""
        modules = [c for c in self.components().values() if isinstance(c, ModuleComponent)]
        parameters_too = not self.optimizers()
        return tuple(version for module in modules for version in module.versions(parameters_too=parameters_too))


def wants(components: Mapping[str, Component], saved: Saved) -> list[Want]:
    """What all components need.

    Raises:
        StructureMismatchError: Something does not fit; with a table of all that does not.
    """
    found: dict[str, Want] = {}
    for want in [want for component in components.values() for want in component.wants(saved)]:
        other = found.setdefault(want.key, want)
        if (other.offsets, other.out.shape) != (want.offsets, want.out.shape):
            raise ConfigError(f"rename: two keys of the state would take different parts of {want.key}")
    saved.drift.check()
    return list(found.values())


def apply(components: Mapping[str, Component], saved: Saved, loaded: Sequence[Want]) -> None:
    """Hand everything that was read to its component."""
    tensors: dict[str, torch.Tensor] = {want.key: want.out for want in loaded}
    for component in components.values():
        component.apply(saved, tensors)


def _is_module(value: Any) -> bool:
    """Whether a value is saved by its parameters and buffers, not by what its ``state_dict()`` copies."""
    if not isinstance(value, nn.Module | Replicated | Part | Cast):
        return False
    module = bare(value)
    return isinstance(module, nn.Module) and not (is_stateful(module) and has_metrics(module))


def _check_claimed_once(state: Mapping[str, Any]) -> None:
    """One object, or a module and a part of it, under two names would be stored and loaded twice."""
    owners: dict[int, str] = {}
    for name, value in state.items():
        target = bare(value)
        if isinstance(target, nn.Module):
            target = unwrap(target)
        if not isinstance(target, nn.Module | Optimizer) and not is_stateful(target):
            continue
        if (other := owners.setdefault(id(target), name)) != name:
            raise SharingError(name, f"the same {type(target).__name__} as {other}; give it one name")
    for name, value in state.items():
        if not isinstance(target := bare(value), nn.Module):
            continue
        for path, child in unwrap(target).named_modules():
            if (other := owners.get(id(unwrap(child)), name)) != name:
                raise SharingError(
                    other, f"it is {name}.{Names(unwrap(target)).of(path)} already; leave one of the two out"
                )
