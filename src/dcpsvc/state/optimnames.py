"""What the parameters of an optimizer are called: here, and in a checkpoint."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from dcpsvc.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from dcpsvc.state.module import ModuleComponent
    from dcpsvc.state.optimview import View
    from dcpsvc.state.saved import Saved


class Names:
    """Of one optimizer's parameters, at one moment.

    Args:
        component: The optimizer's name in the state.
        view: The optimizer.
        modules: The modules of the state, which give its parameters their names.
    """

    def __init__(self, component: str, view: View, modules: Sequence[ModuleComponent]) -> None:
        self._component, self._view = component, view
        self._by_module = [(module, module.parameter_names()) for module in modules]

    @functools.cached_property
    def by_id(self) -> dict[int, str]:
        """A name for each parameter: its FQN, or its place in the groups where no module of the state has it.

        Raises:
            StateError: Two parameters would have the same.
        """
        known: dict[int, str] = {}
        for _, its_names in self._by_module:
            known |= its_names
        names = {
            id(parameter): known.get(id(parameter), f"group-{g}-{p}")
            for g, group in enumerate(self._view.param_groups)
            for p, parameter in enumerate(group["params"])
        }
        if len(set(names.values())) != len(names):
            reason = "two modules of the state have parameters of one name; use an optimizer for each"
            raise StateError(self._component, reason)
        return names

    def key(self, parameter: torch.Tensor) -> str:
        """A parameter's key in the state."""
        for module, names in self._by_module:
            if name := names.get(id(parameter)):
                return f"{module.name}.{name}"
        return f"{self._component}.state.{self.by_id[id(parameter)]}"

    def saved(self, saved: Saved, parameter: torch.Tensor) -> str:
        """What the checkpoint calls a parameter, in the documents of an optimizer."""
        name, key = self.by_id[id(parameter)], self.key(parameter)
        if not key.endswith(f".{name}") or saved.saved_name(key) == key:
            return name
        return saved.saved_name(key).split(".", 1)[-1]

    def modules(self) -> list[ModuleComponent]:
        """Those that the parameters are in."""
        mine = {id(parameter) for parameter in self._view.parameters}
        return [module for module, names in self._by_module if not mine.isdisjoint(names)]
