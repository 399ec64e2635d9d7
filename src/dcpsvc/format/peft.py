"""What belongs in a folder for ``PeftModel.from_pretrained``: which tensors, under which names, and the configuration.

The adapter of a model that has one lies in the folder itself, or ``default`` of several; each other in a folder of its
name below it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import ExportError
from dcpsvc.format.layout import Tensor
from dcpsvc.format.parse import dump
from dcpsvc.format.safetensors import Entry

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from dcpsvc.format.layout import Layout
    from dcpsvc.format.shardfile import Piece

MODEL = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NONE = "has no adapters of PEFT"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""Of an adapter: it may become a directory, here or wherever a checkpoint is exported to."""
REMEDY = "name it with letters, digits, '_' and '-'"


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter of a model.

    Attributes:
        name: As PEFT has it.
        below: Where in the folder: empty, or a name and a slash.
        config: Bytes of its configuration.
        entries: Its tensors.
    """

    name: str
    below: str
    config: bytes
    entries: list[Entry]


def description(component: str, documents: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """What a module says about itself in the documents of a rank; empty if that rank says nothing."""
    name = component.partition(".")[0]
    found = documents.get(name) or documents.get(f"{name}@{rank}")
    return found if isinstance(found, dict) else {}


def entries(layout: Layout, component: str) -> list[Entry]:
    """Every tensor of a module once, by its name in the module; further names of a tied one are left out."""
    prefix = f"{component}."
    found = sorted(layout.tensors.items())
    return [Entry(key.removeprefix(prefix), key, one, one.dtype) for key, one in found if key.startswith(prefix)]


def adapters(component: str, about: Mapping[str, Any], there: Iterable[Entry]) -> list[Adapter]:
    """What a folder holds: each adapter of which there are tensors; one that is not trained may have none.

    Args:
        component: The module's name in the state, or a dotted beginning below it.
        about: What the module says about itself.
        there: Its tensors; see :func:`entries`.

    Raises:
        ExportError: The module has no adapters of PEFT, or at several places; none of them has a tensor; or one has a
            name that could not be a directory.
    """
    place, configs = _place(component, about)
    known = list(there)
    found: list[Adapter] = []
    for name, config in sorted(configs.items()):
        below = "" if len(configs) == 1 or name == "default" else f"{name}/"
        if not NAME.fullmatch(name):
            raise ExportError(component, f"the adapter {name!r} would be a directory of that name; {REMEDY}")
        if tensors := _of_adapter(known, place, name):
            found.append(Adapter(name, below, dump(config | {"inference_mode": True}), tensors))
    if not found:
        raise ExportError(component, f"the checkpoint holds no tensor of the adapters {', '.join(sorted(configs))}")
    return found


def left_out(component: str, about: Mapping[str, Any], found: Iterable[Adapter]) -> list[str]:
    """Names of the adapters that :func:`adapters` found no tensors of."""
    _, configs = _place(component, about)
    return sorted(configs.keys() - {adapter.name for adapter in found})


def held_nbytes(component: str, about: Mapping[str, Any], pieces: Iterable[Piece]) -> int:
    """What one shard holds of the adapters: together with the other shards, what the tensors of the folder take.

    Args:
        component: The module's name in the state, or a dotted beginning below it.
        about: What the module says about itself; of one that no folder can be made of nothing is counted.
        pieces: Of the shard.
    """
    prefix = f"{component}."
    mine = [piece for piece in pieces if piece.key.startswith(prefix)]
    tensors = {piece.key: Tensor(piece.dtype, piece.shape, ()) for piece in mine}
    there = [Entry(key.removeprefix(prefix), key, tensor, tensor.dtype) for key, tensor in tensors.items()]
    try:
        keys = {entry.key for adapter in adapters(component, about, there) for entry in adapter.entries}
    except ExportError:
        return 0
    return sum(piece.nbytes for piece in mine if piece.key in keys)


def outer(entries: Iterable[Entry], made: Collection[str]) -> str:
    """The first tensor made of others, as quantized weights are, that an entry is inside of; empty if there is none.

    Args:
        entries: Of an adapter, or of a whole module.
        made: Keys of such tensors.
    """
    for key in (entry.key for entry in entries) if made else ():
        for at, mark in enumerate(key):
            if mark in ".@" and key[:at] in made:
                return key[:at]
    return ""


def misnamed(component: str, about: Mapping[str, Any]) -> list[str]:
    """Names of adapters, anywhere below a component, that could not be directories."""
    return sorted(name for configs in _below(component, about).values() for name in configs if not NAME.fullmatch(name))


def _place(component: str, about: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where in the module PEFT's model is, and its adapters' configurations."""
    name, _, below = component.partition(".")
    places: dict[str, Any] = about.get("peft", {})
    found = _below(component, about)
    if not places:
        raise ExportError(component, NONE)
    if len(found) != 1:
        there = ", ".join(f"{name}.{path}".rstrip(".") for path in places) or "none"
        raise ExportError(component, f"one model of PEFT is exported at a time, here there are: {there}")
    path, adapters = next(iter(found.items()))
    return path[len(below) :].lstrip("."), adapters


def _below(component: str, about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By the place of each wrapped model in the component, its adapters' configurations."""
    below = component.partition(".")[2]
    places: dict[str, dict[str, Any]] = about.get("peft", {})
    return {path: found for path, found in places.items() if f"{path}.".startswith(f"{below}." if below else "")}


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
