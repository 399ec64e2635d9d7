"""Tensors that hang on an optimizer beside its state, as the slow weights of a Lookahead may: not saved, and so told.

Tables that never change, as those of 8-bit optimizers, are none of these. Gradients are none, either, while they are
those of parameters. Of one that keeps them beyond ``zero_grad()`` it is told: between two steps nothing tells them from
slow weights, and to watch every step would cost more than a needless warning.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from dcpsvc.state import inner
from dcpsvc.state.optimview import layers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch.optim import Optimizer

logger = logging.getLogger(__name__)

_SAVED = {"param_groups", "state", "defaults"}
_DEPTH = 4

Seen = tuple[tuple[int, int], ...]


class Unsaved:
    """Of one optimizer, and those that it holds.

    Args:
        name: Of the component.
        optimizer: As it was given.
    """

    def __init__(self, name: str, optimizer: Optimizer) -> None:
        self._name, self._optimizer = name, optimizer
        self._seen: dict[tuple[int, str], Seen] = {}
        self._changes = Counter[tuple[int, str]]()
        self._told = False

    def look(self, *, tell: bool) -> None:
        """Log, once, which attributes have tensors like all parameters, or others that change from save to save.

        Args:
            tell: Whether this rank is the one that logs it.
        """
        try:
            self._look(tell=tell)
        except Exception as err:  # noqa: BLE001 - a hint never costs a checkpoint, whatever an optimizer is made of
            self._told = True
            logger.debug("%s: not looked for tensors beside its state: %s", self._name, err)

    def _look(self, *, tell: bool) -> None:
        there = () if self._told else layers(self._optimizer)  # those it holds may have been exchanged
        for optimizer in there:
            if names := self._attributes(optimizer, there):
                self._told = True
                if tell:
                    logger.warning(
                        "%s: %s has tensors in %s, in neither its state nor its param_groups: those are not saved; "
                        "what training needs of them is to be a value of the state by itself",
                        self._name, type(optimizer).__name__, ", ".join(names),
                    )  # fmt: skip
                return

    def _attributes(self, optimizer: Optimizer, there: Sequence[Optimizer]) -> list[str]:
        """Those of one, of those that are there, that are suspicious."""
        attributes = {name: value for name, value in vars(optimizer).items() if name not in _SAVED}
        found = {name: [one for one in _tensors(value) if one.numel() > 1] for name, value in attributes.items()}
        if not any(found.values()):
            return []
        saved, shapes = _saved(there), [p.shape for group in optimizer.param_groups for p in group["params"]]
        names: list[str] = []
        for name, tensors in found.items():
            strangers = [one for one in tensors if _memory(one) not in saved]
            if strangers and (_is_like(strangers, shapes) or self._changes_often((id(optimizer), name), strangers)):
                names.append(name)
        return names

    def _changes_often(self, attribute: tuple[int, str], tensors: list[torch.Tensor]) -> bool:
        """Whether they were written to, or are others, for the second time: once is how a table gets to its device."""
        seen = tuple((id(one), inner.version(one)) for one in tensors)
        self._changes[attribute] += seen != self._seen.setdefault(attribute, seen)
        self._seen[attribute] = seen
        return self._changes[attribute] > 1


def _saved(optimizers: Sequence[Optimizer]) -> set[int]:
    """Where the tensors lie that are saved, or that gradients are in."""
    parameters = [p for each in optimizers for group in each.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    states = [tensor for each in optimizers for tensor in _tensors([each.state, each.param_groups])]
    return {_memory(tensor) for tensor in (*parameters, *gradients, *states)}


def _tensors(value: Any, depth: int = _DEPTH) -> Iterator[torch.Tensor]:
    """Those in a value, and in the state of optimizers in it."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if isinstance(value, torch.optim.Optimizer):
        value = value.state
    values: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
    if depth and isinstance(value, Mapping | list | tuple | set):
        for one in values:
            yield from _tensors(one, depth - 1)


def _is_like(tensors: list[torch.Tensor], shapes: list[torch.Size]) -> bool:
    """Whether there is one of each shape, or one for all elements. Single elements, which are no news, do not count."""
    total, large = sum(shape.numel() for shape in shapes), [shape for shape in shapes if shape.numel() > 1]
    flat = any(one.numel() == total for one in tensors)
    return bool(large) and (flat or not Counter(large) - Counter(one.shape for one in tensors))


def _memory(tensor: torch.Tensor) -> int:
    """Where it lies; of what has no memory of its own, which it is."""
    local = inner.local_of(tensor)
    try:
        return local.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):  # a sparse one, or one made of others
        return id(tensor)
