"""The state of an optimizer as torch's ``get_state_dict`` names it, made into a component of ours. No torch."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import ForeignFormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

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

    def fail(reason: str) -> ForeignFormatError:
        return ForeignFormatError(str(found.path), f"{prefix}: {reason}")

    values = {key: read() for key, read in _below(found.values, f"{prefix}.param_groups")}
    if not values:
        raise fail("no optimizer of get_state_dict() is there")
    groups = _groups(values, fail)
    known = sorted({parameter for group in groups for parameter in group["params"]}, key=len, reverse=True)
    state: dict[str, dict[str, Any]] = {}
    tensors: list[Foreign] = []

    def entry(key: str) -> tuple[str, str]:
        parameter = next((one for one in known if key.startswith(f"{one}.")), None)
        if parameter is None:
            raise fail(f"the state {key!r} is of no parameter in its groups")
        return renamed(parameter), key[len(parameter) + 1 :]

    below = f"{prefix}.state."
    for tensor in (one for one in found.tensors if one.name.startswith(below)):
        parameter, rest = entry(tensor.name[len(below) :])
        key = f"{name}.state.{parameter}.{rest}"
        state.setdefault(parameter, {})[rest] = {"$tensor": key}
        tensors.append(replace(tensor, name=key))
    for key, read in _below(found.values, f"{prefix}.state"):
        parameter, rest = entry(key)
        state.setdefault(parameter, {})[rest] = _plain(read(), f"{prefix}.state.{key}", fail)
    document = {
        "state": state,
        "shapes": {parameter: list(shapes[parameter]) for parameter in state if parameter in shapes},
        "param_groups": [
            {key: _plain(value, f"{prefix}.param_groups.{key}", fail) for key, value in group.items()}
            | {"params": [renamed(parameter) for parameter in group["params"]]}
            for group in groups
        ],
    }
    return Optimizer(name=name, tensors=tuple(tensors), document=document)


def _below(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, read in values.items():
        if key == prefix or key.startswith(f"{prefix}."):
            yield key[len(prefix) + 1 :], read


def _groups(values: Mapping[str, Any], fail: Callable[[str], ForeignFormatError]) -> list[dict[str, Any]]:
    """Of a list in one piece, of numbered groups, or of values by parameter, as a flattened optimizer has them."""
    if "" in values:
        groups = values[""]
    elif all(_NUMBERED.fullmatch(key) for key in values) and any(re.fullmatch(r"\d+\.params", key) for key in values):
        numbered: dict[int, dict[str, Any]] = defaultdict(dict)
        for key, value in values.items():
            number, _, rest = key.partition(".")
            numbered[int(number)][rest] = value
        groups = [group for _, group in sorted(numbered.items())]
    else:
        groups = _regrouped(values)
    for group in groups:
        if not isinstance(group, dict) or not all(isinstance(each, str) for each in group.get("params", [0])):
            raise fail("its parameters have no names; save it with get_state_dict() of torch.distributed.checkpoint")
    return list(groups)


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


def _plain(value: Any, key: str, fail: Callable[[str], ForeignFormatError]) -> Any:
    """As a document has it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        items = [_plain(item, key, fail) for item in value]
        return {"$tuple": items} if isinstance(value, tuple) else items
    raise fail(f"{key} is a {type(value).__name__}, and no plain value")
