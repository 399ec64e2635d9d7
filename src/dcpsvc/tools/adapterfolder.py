"""The folder of PEFT of a checkpoint, made anew out of its shards or copied: proven by the manifest either way."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dcpsvc.format import peft
from dcpsvc.format.adapter import AdapterFolder
from dcpsvc.format.safetensors import ordered
from dcpsvc.storage import wholefile
from dcpsvc.storage.wholefile import Writer
from dcpsvc.tools.exporting import Tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dcpsvc.format.adapter import AdapterFile
    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.layout import Layout
    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.storage.base import Store


def remake(
    target: Store, attempt: Attempt, records: Sequence[ShardRecord], layout: Layout, component: str
) -> AdapterFolder:
    """Write the folder that belongs to shards which are whole at ``target`` already.

    Raises:
        ExportError: The module has no adapters of PEFT any more, or one has a tensor that is made of others.
        CorruptShardError: A shard is damaged, or the store does not give back what it was given.
        StoreError: The store does not answer, or does not take it.
    """
    source = Tensors(target, records, layout, component)
    files: list[AdapterFile] = []
    with tempfile.TemporaryDirectory(prefix="dcpsvc-") as scratch:
        for adapter in peft.adapters(component, source.about(), source.entries(None)):
            source.check_plain(adapter.entries)
            prefix = f"{attempt.adapter}{adapter.below}"
            model = source.safetensors(ordered(adapter.entries))
            files.append(_written(target, f"{prefix}{peft.CONFIG}", Path(scratch), [adapter.config]))
            files.append(_written(target, f"{prefix}{peft.MODEL}", Path(scratch), model))
    return AdapterFolder(component=component, files=tuple(sorted(files, key=lambda file: file.path)))


def copy(source: Store, file: AdapterFile, target: Store) -> None:
    """One file to another run root, through a temporary one, unless it is there.

    Raises:
        CorruptShardError: It is damaged.
        StoreError: A run root does not answer, or does not take it.
    """
    with tempfile.TemporaryDirectory(prefix="dcpsvc-") as scratch:
        path = Path(scratch) / "file"
        wholefile.bring(source, file, path)
        wholefile.ensure(target, file, path)


def _written(target: Store, key: str, scratch: Path, parts: Iterable[bytes | memoryview]) -> AdapterFile:
    path = scratch / key
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Writer(path, key)) as writer:
        for part in parts:
            writer.write(part)
        file = writer.finish()
    wholefile.put(target, file, path)
    path.unlink()
    return file
