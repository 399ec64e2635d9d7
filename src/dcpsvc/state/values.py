"""Everything that is neither a module nor an optimizer: Statefuls, tensors, JSON-like values, per-rank values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dcpsvc.errors import StateMismatchError, UnsupportedStateError
from dcpsvc.state import documents
from dcpsvc.state.collected import Collected, Sharing
from dcpsvc.state.rng import Rng
from dcpsvc.state.saved import Saved, Want, copy_into, like, own_name

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping


class PerRank:
    """Declares that each rank has its own value: a data loader, a sampler, an environment.

    A restart with the same number of ranks gives each rank its own back. With more ranks, rank ``r`` takes
    the value of rank ``r % saved``; with fewer, the values of the ranks that are gone are not loaded.

    Args:
        value: A Stateful (``state_dict()`` / ``load_state_dict()``), a tensor, or a JSON-like value.
    """

    def __init__(self, value: Any) -> None:
        if isinstance(value, PerRank | torch.nn.Module | torch.optim.Optimizer):
            raise UnsupportedStateError("PerRank", f"cannot wrap a {type(value).__name__}")
        self.value = value


def is_stateful(value: Any) -> bool:
    """Whether a value brings its own ``state_dict()`` and ``load_state_dict()``."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


class ValueComponent:
    """A Stateful, or a plain value that lives in the user's mapping.

    Args:
        name: Its name in the mapping.
        state: The user's mapping; a plain value that is not a tensor or a dict is replaced in it.
        per_rank: Whether each rank has its own.
    """

    def __init__(self, name: str, state: MutableMapping[str, Any], *, per_rank: bool) -> None:
        self._name, self._state, self._per_rank = name, state, per_rank

    def collect(self, into: Collected) -> None:
        """One document, and its tensors under dotted names."""
        name = own_name(self._name, into.rank) if self._per_rank else self._name
        tensors: dict[str, torch.Tensor] = {}
        document = documents.encode(self._current(), name, tensors)
        (into.own_documents if self._per_rank else into.documents)[name] = document
        for key, tensor in tensors.items():
            into.add(key, tensor, Sharing.PER_RANK if self._per_rank else Sharing.REPLICATED)

    def wants(self, saved: Saved) -> list[Want]:
        """Every tensor the document refers to, in the box this rank holds of it now."""
        document = saved.document(self._saved_name(saved))
        self._check_kind(document)
        templates = self._templates(saved)
        return [
            saved.want_like(key, templates[key]) if key in templates else saved.want_whole(key)
            for key in documents.tensor_names(document)
        ]

    def apply(self, saved: Saved, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the value back, in place where the object allows it."""
        name = self._saved_name(saved)
        templates = self._templates(saved)
        value = documents.decode(saved.document(name), name, lambda key: like(templates.get(key), tensors[key]))
        target = self._target()
        if is_stateful(target):
            target.load_state_dict(value)
        elif isinstance(target, torch.Tensor):
            copy_into(target, tensors[name])
        elif isinstance(target, dict):
            target.clear()
            target.update(value)
        else:
            self._replace(value)
        if isinstance(target, Rng) and saved.rank >= saved.world_size:
            target.reseed(saved.step, saved.rank)

    def _check_kind(self, document: Any) -> None:
        """A tensor or a dict is loaded in place, so it must have been one."""
        target = self._target()
        if is_stateful(target):
            return
        kinds = {torch.Tensor: "$tensor", dict: "dict"}
        here = next((name for kind, name in kinds.items() if isinstance(target, kind)), "value")
        saved = documents.kind_of(document)
        if here not in {saved, "value"}:
            raise StateMismatchError(self._name, f"saved as a {saved.strip('$')}, here it is a {type(target).__name__}")

    def _target(self) -> Any:
        value = self._state[self._name]
        return value.value if isinstance(value, PerRank) else value

    def _current(self) -> Any:
        target = self._target()
        return target.state_dict() if is_stateful(target) else target

    def _replace(self, value: Any) -> None:
        holder = self._state[self._name]
        if isinstance(holder, PerRank):
            holder.value = value
        else:
            self._state[self._name] = value

    def _saved_name(self, saved: Saved) -> str:
        return own_name(self._name, saved.source_rank) if self._per_rank else self._name

    def _templates(self, saved: Saved) -> dict[str, torch.Tensor]:
        """The value's tensors as they are now, by the names they were saved under.

        Only what must keep its kind: a tensor given as such, and DTensors. Others may change shape.
        """
        now: dict[str, torch.Tensor] = {}
        documents.encode(self._current(), self._saved_name(saved), now)
        whole = isinstance(self._target(), torch.Tensor)
        return {key: tensor for key, tensor in now.items() if whole or hasattr(tensor, "device_mesh")}
