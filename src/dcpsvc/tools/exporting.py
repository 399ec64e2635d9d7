"""Folders of the ecosystem out of a checkpoint: sharded safetensors as transformers reads them, adapters as PEFT does.

Tensor by tensor, every byte verified on the way: without torch, a GPU, the training code or a process group, and in the
memory of the largest tensor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dcpsvc.errors import ExportError
from dcpsvc.format import peft
from dcpsvc.format.layout import ITEM_NBYTES
from dcpsvc.format.parse import dump
from dcpsvc.format.safetensors import head, ordered
from dcpsvc.format.shardfile import INNER
from dcpsvc.leases import held
from dcpsvc.storage.shards import VerifiedShard
from dcpsvc.storage.threads import at_once, each
from dcpsvc.tools.casting import cast, result
from dcpsvc.tools.folder import Folder
from dcpsvc.tools.showing import show

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from dcpsvc.format.layout import Chunk, Layout, Tensor
    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.format.safetensors import Entry
    from dcpsvc.storage.base import Store

MAX_SHARD_NBYTES = 5 << 30
"""As transformers has it."""


class Tensors:
    """What one module has in a checkpoint's shards.

    Args:
        store: The run root.
        records: The shards.
        layout: Where every tensor lies in them.
        component: The module's name in the state, or a dotted beginning below it.
    """

    def __init__(self, store: Store, records: Sequence[ShardRecord], layout: Layout, component: str) -> None:
        self.component, self.layout = component, layout
        self._shards = {record.rank: VerifiedShard([store], record) for record in records}
        self._at_once, self._said = at_once(store), dict[int, dict[str, Any]]()

    def entries(self, dtype: str | None) -> list[Entry]:
        """Every tensor of the module once, by its name in the module; further names of a tied one are left out."""
        return [replace(one, dtype=result(one.dtype, dtype)) for one in peft.entries(self.layout, self.component)]

    def check_plain(self, entries: list[Entry]) -> None:
        """Refuse what a library would not know: it would leave those tensors out, and the model as it was made.

        Raises:
            ExportError: Some are what is inside tensors of a class of their own, as quantized weights are.
        """
        made = {key for rank, said in self._documents(*self._shards) for key in said.get(f"{INNER}@{rank}", {})}
        if outer := peft.outer(entries, made):
            reason = "is made of others, which such a folder cannot say; --format torch or dcp gives those by name"
            raise ExportError(outer, f"{reason}, or load it and export what it stands for")

    def about(self) -> dict[str, Any]:
        """What the module said about itself."""
        for ranks in (list(self._shards)[:1], self._shards):  # mostly the first says it
            for rank, said in self._documents(*ranks):
                found: dict[str, Any] = said.get(self._name) or said.get(f"{self._name}@{rank}") or {}
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

    def safetensors(
        self, entries: Sequence[Entry], progress: Callable[[int], None] = lambda _: None
    ) -> Iterator[bytes | memoryview]:
        """A file, tensor by tensor."""
        yield head(entries)
        for entry in entries:
            yield self.read(entry).data
            progress(entry.tensor.nbytes)

    @property
    def _name(self) -> str:
        return self.component.split(".", 1)[0]

    def _documents(self, *ranks: int) -> Iterable[tuple[int, dict[str, Any]]]:
        """What the shards of these ranks say of the module, and of tensors made of others. Each is read once."""
        missing = [rank for rank in ranks if rank not in self._said]
        self._said |= zip(missing, each(self._read_documents, missing, self._at_once), strict=True)
        return ((rank, self._said[rank]) for rank in ranks)

    def _read_documents(self, rank: int) -> dict[str, Any]:
        names = {self._name, f"{self._name}@{rank}", f"{INNER}@{rank}"}
        return {name: value for name, value in self._shards[rank].documents().items() if name in names}

    def _chunk(self, tensor: Tensor, chunk: Chunk) -> NDArray[np.uint8]:
        nbytes = chunk.numel * ITEM_NBYTES[tensor.dtype]
        return np.frombuffer(self._shards[chunk.rank].read(chunk.begin, chunk.begin + nbytes), dtype=np.uint8)


class Source(Tensors):
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
        super().__init__(store, shown.manifest.shards, shown.layout, component)
        self._store, self.manifest = store, shown.manifest
        if not any(key.startswith(f"{component}.") for key in self.layout.names()):
            there = sorted({key.split(".", 1)[0] for key in self.layout.names()})
            raise ExportError(
                f"{store.url} step {step}", f"no tensors below {component!r}; there are {', '.join(there)}"
            )

    def held(self) -> AbstractContextManager[None]:
        """No live job deletes it meanwhile."""
        return held(self._store, self.manifest.key)

    def identity(self) -> dict[str, Any]:
        """Which checkpoint this is."""
        return {"run_id": self.manifest.run_id, "step": self.manifest.step, "attempt": self.manifest.attempt}


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
    files = _divide(entries, max_shard_nbytes)
    about = {"format": "hf", "dtype": dtype, "max_shard_nbytes": max_shard_nbytes, "component": source.component}
    with source.held():
        source.check_plain(entries)
        config = source.about().get("config")
        folder = Folder(directory, about | source.identity())
        for name, part in files.items():
            _put(folder, name, source, part, progress)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
            "weight_map": {entry.name: name for name, part in files.items() for entry in part},
        }
        folder.write("model.safetensors.index.json", [dump(index)])
    if config:
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
    with source.held():
        adapters = _adapters(source, dtype)
        kind = {"format": "peft", "dtype": dtype, "component": source.component}
        folder = Folder(directory, kind | source.identity())
        for adapter in adapters:
            source.check_plain(adapter.entries)
            _put(folder, f"{adapter.below}{peft.MODEL}", source, adapter.entries, progress)
            if not folder.has(config := f"{adapter.below}{peft.CONFIG}"):
                folder.write(config, [adapter.config])
    folder.finish()


def _adapters(source: Source, dtype: str | None) -> list[peft.Adapter]:
    about = source.about()
    if not about.get("peft"):
        raise ExportError(source.component, f"{peft.NONE}; --format hf writes it as it is")
    return peft.adapters(source.component, about, source.entries(dtype))


def _put(folder: Folder, name: str, source: Source, entries: list[Entry], progress: Callable[[int], None]) -> None:
    """A file of tensors; one that is whole already stays."""
    if folder.has(name):
        progress(sum(entry.tensor.nbytes for entry in entries))
    else:
        folder.write(name, source.safetensors(ordered(entries), progress))


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


def planned_nbytes(source: Source, *, adapters: bool = False) -> int:
    """What an export of the whole module reads, or of its adapters.

    Raises:
        ExportError: It has no adapters of PEFT, or at several places.
    """
    entries = source.entries(None)
    if adapters:
        entries = [entry for adapter in _adapters(source, None) for entry in adapter.entries]
    return sum(entry.tensor.nbytes for entry in entries)
