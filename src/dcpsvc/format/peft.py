"""What belongs in a folder for ``PeftModel.from_pretrained``: which tensors, under which names, and the configuration.

One adapter lies in the folder itself, or ``default`` of several; each other in a folder of its name below it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import ExportError
from dcpsvc.format.parse import dump
from dcpsvc.format.safetensors import Entry

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dcpsvc.format.layout import Layout

MODEL = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NONE = "has no adapters of PEFT"


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter of a model.

    Attributes:
        below: Where in the folder: empty, or a name and a slash.
        config: Bytes of its configuration.
        entries: Its tensors.
    """

    below: str
    config: bytes
    entries: list[Entry]


def entries(layout: Layout, component: str) -> list[Entry]:
    """Every tensor of a module once, by its name in the module; further names of a tied one are left out."""
    prefix = f"{component}."
    found = sorted(layout.tensors.items())
    return [Entry(key.removeprefix(prefix), key, one, one.dtype) for key, one in found if key.startswith(prefix)]


def adapters(component: str, about: Mapping[str, Any], there: Iterable[Entry]) -> list[Adapter]:
    """What a folder holds.

    Args:
        component: The module's name in the state, or a dotted beginning below it.
        about: What the module says about itself.
        there: Its tensors; see :func:`entries`.

    Raises:
        ExportError: The module has no adapters of PEFT, or at several places; or one of them has no tensor.
    """
    place, configs = _place(component, about)
    known = list(there)
    found: list[Adapter] = []
    for name, config in sorted(configs.items()):
        below = "" if len(configs) == 1 or name == "default" else f"{name}/"
        tensors = _of_adapter(known, place, name)
        if not tensors:
            raise ExportError(component, f"the checkpoint holds no tensor of the adapter {name!r}")
        found.append(Adapter(below, dump(config | {"inference_mode": True}), tensors))
    return found


def _place(component: str, about: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where in the module PEFT's model is, and its adapters' configurations."""
    name, _, below = component.partition(".")
    places: dict[str, Any] = about.get("peft", {})
    found = {path: adapters for path, adapters in places.items() if f"{path}.".startswith(f"{below}." if below else "")}
    if not places:
        raise ExportError(component, NONE)
    if len(found) != 1:
        there = ", ".join(f"{name}.{path}".rstrip(".") for path in places) or "none"
        raise ExportError(component, f"one model of PEFT is exported at a time, here there are: {there}")
    path, adapters = next(iter(found.items()))
    return path[len(below) :].lstrip("."), adapters


def _of_adapter(there: Iterable[Entry], place: str, adapter: str) -> list[Entry]:
    """Its tensors, as PEFT calls them in a file: from its own model on, without the adapter's name."""
    prefix = f"{place}." if place else ""
    found: list[Entry] = []
    for entry in there:
        parts = entry.name.removeprefix(prefix).split(".")
        if not entry.name.startswith(prefix) or adapter not in parts[1:]:
            continue
        at = parts.index(adapter, 1)
        begin = at - 1 if parts[at - 1] == "modules_to_save" else at
        found.append(replace(entry, name=".".join([*parts[:begin], *parts[at + 1 :]])))
    return found
