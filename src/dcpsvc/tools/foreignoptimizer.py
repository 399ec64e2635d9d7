"""The state of an optimizer as torch's ``get_state_dict`` names it, made into a component of ours. No torch."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import ForeignFormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from dcpsvc.tools.foreign import Foreign, Found

_NUMBERED = re.compile(r"(\d+)\.(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """What to take of one.

    Attributes:
        name: What it is called in the state.
        tensors: By their whole keys.
        document: Its component's.
    """

    name: str
    tensors: tuple[Foreign, ...]
    document: Mapping[str, Any]


def taken(found: Found, prefix: str, name: str, renamed: Callable[[str], str], shapes: Mapping[str, Any]) -> Optimizer:
    """The optimizer below a dotted beginning.

    Args:
        found: All that there is.
        prefix: Where the optimizer is in it.
        name: What it is to be called in the state.
        renamed: What a parameter is to be called.
        shapes: Of the model's tensors, by their new names.

    Raises:
        ForeignFormatError: There is none, or its parameters have no names, or a value is neither tensor nor plain.
    """
    source = _Source(found, prefix, renamed)
    groups = source.groups()
    known = sorted({parameter for group in groups for parameter in group["params"]}, key=len, reverse=True)
    state: dict[str, dict[str, Any]] = {}
    tensors: list[Foreign] = []
    for parameter, entry, tensor in source.tensors(known):
        key = f"{name}.state.{parameter}.{entry}"
        state.setdefault(parameter, {})[entry] = {"$tensor": key}
        tensors.append(replace(tensor, name=key))
    for parameter, entry, value in source.values(known):
        state.setdefault(parameter, {})[entry] = value
    document = {
        "state": state,
        "shapes": {parameter: list(shapes[parameter]) for parameter in state if parameter in shapes},
        "param_groups": [source.hyperparameters(group) for group in groups],
    }
    return Optimizer(name=name, tensors=tuple(tensors), document=document)


@dataclass(frozen=True, slots=True)
class _Source:
    """What lies below a dotted beginning. Whatever cannot be taken is a :class:`ForeignFormatError`."""

    found: Found
    prefix: str
    renamed: Callable[[str], str]

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups, with the names that parameters have there."""
        values = {key: read() for key, read in _below(self.found.values, f"{self.prefix}.param_groups")}
        if not values:
            raise self._refused("no optimizer of get_state_dict() is there")
        groups = _groups(values)
        for group in groups:
            if not isinstance(group, dict) or not all(isinstance(each, str) for each in group.get("params", [0])):
                reason = "its parameters have no names; save it with get_state_dict() of torch.distributed.checkpoint"
                raise self._refused(reason)
        return groups

    def tensors(self, known: Sequence[str]) -> Iterator[tuple[str, str, Foreign]]:
        """Each of the state: what its parameter is to be called, and what it is of that."""
        below = f"{self.prefix}.state."
        for tensor in self.found.tensors:
            if tensor.name.startswith(below):
                yield *self._split(tensor.name.removeprefix(below), known), tensor

    def values(self, known: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
        """Likewise each that is no tensor, as a document has it."""
        for key, read in _below(self.found.values, f"{self.prefix}.state"):
            yield *self._split(key, known), self._plain(read(), f"state.{key}")

    def hyperparameters(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Of a group, as a document has them."""
        plain = {key: self._plain(value, f"param_groups.{key}") for key, value in group.items()}
        return plain | {"params": [self.renamed(parameter) for parameter in group["params"]]}

    def _split(self, key: str, known: Sequence[str]) -> tuple[str, str]:
        parameter = next((one for one in known if key.startswith(f"{one}.")), None)
        if parameter is None:
            raise self._refused(f"the state {key!r} is of no parameter in its groups")
        return self.renamed(parameter), key[len(parameter) + 1 :]

    def _plain(self, value: Any, key: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, tuple | list):
            items = [self._plain(item, key) for item in value]
            return {"$tuple": items} if isinstance(value, tuple) else items
        raise self._refused(f"{self.prefix}.{key} is a {type(value).__name__}, and no plain value")

    def _refused(self, reason: str) -> ForeignFormatError:
        return ForeignFormatError(str(self.found.path), f"{self.prefix}: {reason}")


def _below(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, read in values.items():
        if key == prefix or key.startswith(f"{prefix}."):
            yield key[len(prefix) + 1 :], read


def _groups(values: Mapping[str, Any]) -> list[Any]:
    """Of a list in one piece, of numbered groups, or of values by parameter, as a flattened optimizer has them."""
    if "" in values:
        return list(values[""])
    if all(_NUMBERED.fullmatch(key) for key in values) and any(re.fullmatch(r"\d+\.params", key) for key in values):
        numbered: dict[int, dict[str, Any]] = defaultdict(dict)
        for key, value in values.items():
            number, _, rest = key.partition(".")
            numbered[int(number)][rest] = value
        return [group for _, group in sorted(numbered.items())]
    return _regrouped(values)


def _regrouped(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parameters with the same values are of one group, in the order in which they come."""
    of: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in values.items():
        parameter, _, name = key.rpartition(".")
        of[parameter][name] = value
    groups: list[dict[str, Any]] = []
    for parameter, said in of.items():
        group = next((one for one in groups if {k: v for k, v in one.items() if k != "params"} == said), None)
        if group is None:
            groups.append(group := said | {"params": []})
        group["params"].append(parameter)
    return groups
