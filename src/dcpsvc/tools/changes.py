"""What to change in a checkpoint's plain values: ``optim.lr=1e-4``. Pure: documents in, documents out."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import StateError
from dcpsvc.format.shardfile import of_components

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_GROUPS = "param_groups"
_TENSORS = ("$tensor", "$ndarray", "$scalar", "$wrapper")


@dataclass(frozen=True, slots=True)
class Setting:
    """One value to set.

    Attributes:
        path: ``optim.lr``, ``optim.param_groups.0.lr``, ``loader.epoch``; the first part names the component.
        value: As JSON.
    """

    path: str
    value: Any

    @property
    def component(self) -> str:
        """Whose value it is."""
        return self.path.partition(".")[0]


def setting(text: str) -> Setting:
    """``PATH=VALUE``; a value that is not JSON is a text.

    Raises:
        ValueError: There is no path, or no ``=``.
    """
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ValueError(f"{text!r} is not PATH=VALUE")
    try:
        return Setting(path, json.loads(value, parse_constant=float))
    except ValueError:
        return Setting(path, value)


def component(name: str) -> str:
    """The component a document or tensor belongs to: ``rng`` of ``rng@3`` and of ``rng@3.torch``."""
    return name.partition(".")[0].partition("@")[0]


def changed(
    documents: Mapping[str, Any], settings: Iterable[Setting], drop: Iterable[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The documents of one shard with the values set, and a line for each change. A per-rank one counts as its own.

    Args:
        documents: By component; not changed.
        settings: What to set; of components that this shard does not hold, nothing.
        drop: Components to leave out.

    Raises:
        StateError: There is no such value, it is a tensor, or the new one is of another kind.
    """
    dropped = set(drop)
    kept = {name: copy.deepcopy(value) for name, value in documents.items() if component(name) not in dropped}
    for name in kept.keys() - of_components(kept).keys():
        kept[name] = {key: record for key, record in kept[name].items() if component(key) not in dropped}
    lines: list[str] = []
    for each in settings:
        for name in [name for name in kept if component(name) == each.component]:
            kept[name] = _set(kept[name], each, name, lines)
    return kept, lines


def _set(document: Any, each: Setting, name: str, lines: list[str]) -> Any:
    """Set one value in one document; what stands for the document afterwards."""
    rest = each.path.partition(".")[2]
    if not rest:
        new = _like(document, each.value, each.path)
        lines.append(f"{name}: {_told(document)} -> {_told(new)}")
        return new
    parts = rest.split(".")
    groups = document.get(_GROUPS) if isinstance(document, dict) else None
    if isinstance(groups, list) and isinstance(document, dict) and parts[0] not in document:
        for number, group in enumerate(groups):
            _set_in(group, parts, each, f"{name}.{_GROUPS}.{number}", lines)
    else:
        _set_in(document, parts, each, name, lines)
    return document


def _set_in(place: Any, parts: list[str], each: Setting, where: str, lines: list[str]) -> None:
    key, rest = _step(place, parts, each.path)
    if rest:
        _set_in(place[key], rest, each, f"{where}.{key}", lines)
        return
    old, place[key] = place[key], _like(place[key], each.value, each.path)
    lines.append(f"{where}.{key}: {_told(old)} -> {_told(place[key])}")


def _step(place: Any, parts: list[str], path: str) -> tuple[Any, list[str]]:
    """The key that the path goes on with, and what is left of it; names may have dots, so the longest counts."""
    if isinstance(place, list):
        if parts[0].isdecimal() and int(parts[0]) < len(place):
            return int(parts[0]), parts[1:]
        raise StateError(path, f"a list of {len(place)}: {parts[0]!r} is no place in it")
    if not isinstance(place, dict) or any(str(name).startswith("$") for name in place):
        raise StateError(path, f"nothing lies below {_told(place)}")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in place:
            return name, parts[end:]
    raise StateError(path, f"there is no {parts[0]!r}; there are: {', '.join(sorted(map(str, place))[:20])}")


def _like(old: Any, new: Any, path: str) -> Any:
    """The new value, tagged as the old one was."""
    tag = next(iter(old), "") if isinstance(old, dict) else ""
    if tag in _TENSORS:
        raise StateError(path, "is a tensor; only plain values can be set")
    if tag == "$tuple" and isinstance(new, list):
        return {"$tuple": new}
    if tag == "$float" or (_is_number(old) and _is_number(new)):
        if not _is_number(new):
            raise StateError(path, f"is a number, {_told(new)} is none")
        return new if math.isfinite(new) else {"$float": str(float(new))}
    if old is not None and new is not None and (tag.startswith("$") or type(old) is not type(new)):
        raise StateError(path, f"is {_told(old)}, {_told(new)} is of another kind")
    return new


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _told(value: Any) -> str:
    if isinstance(value, dict) and len(value) == 1:
        tag, content = next(iter(value.items()))
        if str(tag).startswith("$"):
            value = content
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."  # noqa: PLR2004 - for people
