"""Folders of the ecosystem out of a checkpoint: sharded safetensors as transformers reads them, adapters as PEFT does.

Tensor by tensor, every byte verified on the way: without torch, a GPU, the training code or a process group, and in the
memory of the largest tensor.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dcpsvc.errors import ExportError
from dcpsvc.format.layout import ITEM_NBYTES
from dcpsvc.format.parse import compact, dump
from dcpsvc.format.shardfile import FOREIGN, INNER
from dcpsvc.leases import held
from dcpsvc.storage.shards import VerifiedShard
from dcpsvc.tools.casting import cast, result
from dcpsvc.tools.folder import Folder
from dcpsvc.tools.showing import show

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from dcpsvc.format.layout import Chunk, Tensor
    from dcpsvc.storage.base import Store

MAX_SHARD_NBYTES = 5 << 30
"""As transformers has it."""

_ALIGNED = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the result: its name there, its name in the checkpoint, and what it is."""

    name: str
    key: str
    tensor: Tensor
    dtype: str

    @property
    def nbytes(self) -> int:
        """In the result."""
        return math.prod(self.tensor.shape) * ITEM_NBYTES[self.dtype]


class Source:
    """One module of a checkpoint.

    Args:
        store: The run root.
        step: Of a commit.
        component: The module's name in the state, or a dotted beginning below it.
        attempt: Which of the step; None: the newest.

    Raises:
        NoSuchStepError: The step is not committed, or damaged.
        ExportError: It has no such component.
    """

    def __init__(self, store: Store, step: int, component: str, attempt: str | None = None) -> None:
        shown = show(store, step, attempt)
        self.component, self.layout, self.manifest = component, shown.layout, shown.manifest
        self._store = store
        self._shards = {record.rank: VerifiedShard([store], record) for record in shown.manifest.shards}
        if not any(key.startswith(f"{component}.") for key in self.layout.names()):
            there = sorted({key.split(".", 1)[0] for key in self.layout.names()})
            raise ExportError(
                f"{store.url} step {step}", f"no tensors below {component!r}; there are {', '.join(there)}"
            )

    def held(self) -> AbstractContextManager[None]:
        """No live job deletes it meanwhile."""
        return held(self._store, self.manifest.key)

    def entries(self, dtype: str | None) -> list[Entry]:
        """Every tensor of the module once, by its name in the module; further names of a tied one are left out."""
        prefix = f"{self.component}."
        return [
            Entry(key.removeprefix(prefix), key, tensor, result(tensor.dtype, dtype))
            for key, tensor in sorted(self.layout.tensors.items())
            if key.startswith(prefix)
        ]

    def check_plain(self, entries: list[Entry]) -> None:
        """Refuse what a library would not know: it would leave those tensors out, and the model as it was made.

        Raises:
            ExportError: Some are what is inside tensors of a class of their own, as quantized weights are.
        """
        made = {key for rank, one in self._shards.items() for key in one.documents().get(f"{INNER}@{rank}", {})}
        for entry in entries if made else ():
            outer = next(
                (entry.key[:at] for at, mark in enumerate(entry.key) if mark in ".@" and entry.key[:at] in made), ""
            )
            if outer:
                reason = "is made of others, which such a folder cannot say; --format torch or dcp gives those by name"
                raise ExportError(outer, f"{reason}, or load it and export what it stands for")

    def about(self) -> dict[str, Any]:
        """What the module said about itself."""
        name = self.component.split(".", 1)[0]
        for rank, shard in self._shards.items():
            documents = shard.documents()
            found: dict[str, Any] = documents.get(name) or documents.get(f"{name}@{rank}") or {}
            if found:
                return found
        return {}

    def read(self, entry: Entry) -> NDArray[np.uint8]:
        """The bytes of a tensor, verified, put together, and cast; row major."""
        tensor, item = entry.tensor, ITEM_NBYTES[entry.tensor.dtype]
        chunks = tensor.chunks
        if len(chunks) == 1:
            return cast(self._chunk(tensor, chunks[0]).reshape(-1), tensor.dtype, entry.dtype)
        whole = np.empty((*tensor.shape, item), dtype=np.uint8)
        for chunk in chunks:
            box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[box] = self._chunk(tensor, chunk).reshape(*chunk.sizes, item)
        return cast(whole.reshape(-1), tensor.dtype, entry.dtype)

    def identity(self) -> dict[str, Any]:
        """Which checkpoint this is."""
        return {"run_id": self.manifest.run_id, "step": self.manifest.step, "attempt": self.manifest.attempt}

    def _chunk(self, tensor: Tensor, chunk: Chunk) -> NDArray[np.uint8]:
        nbytes = chunk.numel * ITEM_NBYTES[tensor.dtype]
        return np.frombuffer(self._shards[chunk.rank].read(chunk.begin, chunk.begin + nbytes), dtype=np.uint8)


def export_hf(
    source: Source,
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """A folder for ``from_pretrained``: safetensors files of at most a size, their index, and ``config.json`` if kept.

    Raises:
        ExportError: The directory holds something else, or a tensor of the module is made of others.
        CorruptShardError: The checkpoint is damaged; names the file.
    """
    entries = source.entries(dtype)
    source.check_plain(entries)
    files = _divide(entries, max_shard_nbytes)
    about = {"format": "hf", "dtype": dtype, "max_shard_nbytes": max_shard_nbytes, "component": source.component}
    folder = Folder(directory, about | source.identity())
    with source.held():
        for name, part in files.items():
            if not folder.has(name):
                folder.write(name, _safetensors(source, part, progress))
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
            "weight_map": {entry.name: name for name, part in files.items() for entry in part},
        }
        folder.write("model.safetensors.index.json", [dump(index)])
    if config := source.about().get("config"):
        folder.write("config.json", [dump(config)])
    folder.finish()


def export_peft(
    source: Source,
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """A folder for ``PeftModel.from_pretrained``: one adapter in it, or one below it for each but ``default``.

    Raises:
        ExportError: The module has no adapters of PEFT, or at several places; or the directory holds something else.
        CorruptShardError: The checkpoint is damaged; names the file.
    """
    place, adapters = _place(source)
    folder = Folder(directory, {"format": "peft", "dtype": dtype, "component": source.component} | source.identity())
    for adapter, config in adapters.items():
        below = "" if len(adapters) == 1 or adapter == "default" else f"{adapter}/"
        entries = _of_adapter(source.entries(dtype), place, adapter)
        if not entries:
            raise ExportError(source.component, f"the checkpoint holds no tensor of the adapter {adapter!r}")
        source.check_plain(entries)
        with source.held():
            folder.write(f"{below}adapter_model.safetensors", _safetensors(source, entries, progress))
        folder.write(f"{below}adapter_config.json", [dump(config | {"inference_mode": True})])
    folder.finish()


def _place(source: Source) -> tuple[str, dict[str, Any]]:
    """Where in the module PEFT's model is, and its adapters' configurations."""
    name, _, below = source.component.partition(".")
    places: dict[str, Any] = source.about().get("peft", {})
    found = {path: adapters for path, adapters in places.items() if f"{path}.".startswith(f"{below}." if below else "")}
    if len(found) != 1:
        there = ", ".join(f"{name}.{path}".rstrip(".") for path in places) or "none"
        raise ExportError(source.component, f"one model of PEFT is exported at a time, here there are: {there}")
    path, adapters = next(iter(found.items()))
    return path[len(below) :].lstrip("."), adapters


def _of_adapter(entries: list[Entry], place: str, adapter: str) -> list[Entry]:
    """Its tensors, as PEFT calls them in a file: from its own model on, without the adapter's name."""
    prefix = f"{place}." if place else ""
    found: list[Entry] = []
    for entry in entries:
        parts = entry.name.removeprefix(prefix).split(".")
        if not entry.name.startswith(prefix) or adapter not in parts[1:]:
            continue
        at = parts.index(adapter, 1)
        begin = at - 1 if parts[at - 1] == "modules_to_save" else at
        found.append(Entry(".".join([*parts[:begin], *parts[at + 1 :]]), entry.key, entry.tensor, entry.dtype))
    return found


def _divide(entries: list[Entry], max_nbytes: int) -> dict[str, list[Entry]]:
    """Files in order, each at most so large, or of one tensor that is larger."""
    parts: list[list[Entry]] = [[]]
    room = max_nbytes
    for entry in entries:
        if entry.nbytes > room and parts[-1]:
            parts.append([])
            room = max_nbytes
        parts[-1].append(entry)
        room -= entry.nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, 1)}


def _safetensors(source: Source, entries: list[Entry], progress: Callable[[int], None]) -> Iterator[bytes | memoryview]:
    """A file, tensor by tensor: widest elements first, so that each is aligned."""
    ordered = sorted(entries, key=lambda entry: (-ITEM_NBYTES[entry.dtype], entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for entry in ordered:
        known, parts = FOREIGN.get(entry.dtype, (entry.dtype, ()))
        end = begin + entry.nbytes
        header[entry.name] = {"dtype": known, "shape": [*entry.tensor.shape, *parts], "data_offsets": [begin, end]}
        begin = end
    text = compact(header)
    text = text.ljust(-(-len(text) // _ALIGNED) * _ALIGNED)
    yield struct.pack("<Q", len(text)) + text
    for entry in ordered:
        data = source.read(entry)
        yield data.data
        progress(entry.tensor.nbytes)


def planned_nbytes(source: Source) -> int:
    """What an export of the whole module reads."""
    return sum(entry.tensor.nbytes for entry in source.entries(None))
