"""The user's mapping of names to objects, as components in the order they must be handled."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from dcpsvc.errors import ConfigError, StateMismatchError
from dcpsvc.state.collected import Collected
from dcpsvc.state.module import ModuleComponent
from dcpsvc.state.optimizer import OptimizerComponent
from dcpsvc.state.rng import Rng
from dcpsvc.state.values import PerRank, ValueComponent

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, MutableMapping, Sequence

    import torch

    from dcpsvc.state.saved import Component, Saved, Want

_NAME = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_-]*")


class AppState:
    """Everything one Checkpointer saves and restores.

    Args:
        state: Names to objects. Read anew at each save, so values may be replaced.
    """

    def __init__(self, state: MutableMapping[str, Any]) -> None:
        if not state:
            raise ConfigError("the state is empty: there is nothing to save")
        for name in state:
            if not _NAME.fullmatch(str(name)):
                raise ConfigError(f"state name {name!r}: use letters, digits, '_' and '-', and no '__' in front")
        self._state = state
        self._known: tuple[tuple[tuple[str, int], ...], dict[str, Component]] = ((), {})
        self.components()

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

    def _make_components(self) -> dict[str, Component]:
        modules = {name: value for name, value in self._state.items() if isinstance(value, nn.Module)}
        found: dict[str, Component] = {name: ModuleComponent(name, module) for name, module in modules.items()}
        for name, value in self._state.items():
            if isinstance(value, Optimizer):
                found[name] = OptimizerComponent(name, value, list(modules.values()))
            elif name not in modules:
                found[name] = ValueComponent(name, self._state, per_rank=isinstance(value, PerRank | Rng))
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

    def chosen(self, saved: Saved, skip: Collection[str]) -> dict[str, Component]:
        """The components to load.

        Raises:
            StateMismatchError: One is not in the checkpoint and was not skipped by name.
            ConfigError: ``skip`` names something that is not in the state.
        """
        components = self.components()
        if unknown := sorted(set(skip) - components.keys()):
            raise ConfigError(f"skip={unknown[0]!r} is not in the state, which has {', '.join(components)}")
        chosen = {name: component for name, component in components.items() if name not in skip}
        for name in chosen:
            if not saved.has(name):
                raise StateMismatchError(
                    name,
                    f"the checkpoint of step {saved.step} has no such component; skip=[{name!r}] starts without it",
                )
        return chosen

    def _owners(self) -> dict[int, int]:
        found: dict[int, int] = {}
        shared: set[int] = set()
        for optimizer in self.optimizers():
            for parameter in (each for group in optimizer.param_groups for each in group["params"]):
                if found.setdefault(id(parameter), id(optimizer)) != id(optimizer):
                    shared.add(id(parameter))
        return {parameter: optimizer for parameter, optimizer in found.items() if parameter not in shared}

    def optimizers(self) -> list[Optimizer]:
        """Every optimizer of the state."""
        return [value for value in self._state.values() if isinstance(value, Optimizer)]

    def versions(self) -> tuple[int, ...]:
        """Changes when a module was written to other than by an optimizer of the state."""
        modules = [c for c in self.components().values() if isinstance(c, ModuleComponent)]
        parameters_too = not self.optimizers()
        return tuple(version for module in modules for version in module.versions(parameters_too=parameters_too))


def wants(components: Mapping[str, Component], saved: Saved) -> list[Want]:
    """What all components need."""
    return [want for component in components.values() for want in component.wants(saved)]


def apply(components: Mapping[str, Component], saved: Saved, loaded: Sequence[Want]) -> None:
    """Hand everything that was read to its component."""
    tensors: dict[str, torch.Tensor] = {want.key: want.out for want in loaded}
    for component in components.values():
        component.apply(saved, tensors)
