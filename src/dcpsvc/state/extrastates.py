"""What modules give beside their tensors by ``get_extra_state()``: JSON-like values, or a tensor among the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dcpsvc.errors import StateMismatchError, UnsupportedStateError
from dcpsvc.state import documents

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dcpsvc.state.saved import Saved
    from dcpsvc.state.wrappers import Names

SUFFIX = "_extra_state"
"""Of every key of one."""


class ExtraStates:
    """Of one component.

    Args:
        component: Its name in the state.
        module: Without what wraps it.
        names: Of what is in the module.
    """

    def __init__(self, component: str, module: nn.Module, names: Names) -> None:
        self._component, self._module, self._names = component, module, names

    def put(self, key: str, value: Any) -> None:
        """Hand it to the module a key's extra state is of, and not to what wraps that."""
        owner, takes = self._owner(key), nn.Module.set_extra_state
        found = [child for path, child in self._module.named_modules() if self._names.of(path) == owner]
        next((one for one in found if type(one).set_extra_state is not takes), found[-1]).set_extra_state(value)

    def note(self, saved: Saved, mine: Iterable[str]) -> None:
        """Which of those that are no tensors only one side has.

        Args:
            saved: The checkpoint.
            mine: Their keys here.
        """
        prefix, here, owners = f"{saved.saved_name(self._component)}.", set(mine), self._owners()
        found = {saved.terms.name_here(k) for k in saved.documents if k.startswith(prefix) and k.endswith(SUFFIX)}
        for key in (key for key in sorted(found ^ here) if not saved.terms.skips(key)):
            if key in here:
                saved.drift.let_pass(key, "missing", "-", "an extra state")
            elif self._owner(key) not in owners:
                saved.drift.add(key, "unexpected", "an extra state", "-")

    def put_values(self, saved: Saved) -> None:
        """All that are no tensors."""
        prefix = f"{saved.saved_name(self._component)}."
        owners = self._owners()
        found = {saved.terms.name_here(k): v for k, v in saved.documents.items() if k.startswith(prefix)}
        for key, document in found.items():
            if not key.endswith(SUFFIX) or saved.terms.skips(key):
                continue
            if self._owner(key) in owners:
                self.put(key, documents.decode(document, key, _no_tensor))

    def _owners(self) -> set[str]:
        return {self._names.of(path) for path, _ in self._module.named_modules()}

    def _owner(self, key: str) -> str:
        return key[len(self._component) + 1 :].removesuffix(SUFFIX).rstrip(".")


def encoded(key: str, value: Any) -> Any:
    """A value as JSON.

    Raises:
        UnsupportedStateError: A tensor is hidden in it: it has no place in the module's tensors.
    """
    return documents.encode(value, key, _NoTensors(key))


class _NoTensors(dict[str, torch.Tensor]):
    """Refuses every one."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self._key = key

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        raise UnsupportedStateError(name, f"a tensor inside the extra state {self._key}; register it as a buffer")


def _no_tensor(name: str) -> torch.Tensor:
    raise StateMismatchError(name, "an extra state cannot refer to a tensor")
