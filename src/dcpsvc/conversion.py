"""A checkpoint in torch's own formats: a stock DCP directory, or one file of ``torch.save``.

What is read goes through a file that is mapped into memory, so the state need not fit into it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from dcpsvc.errors import ExportError
from dcpsvc.leases import held
from dcpsvc.reader import CheckpointReader, read
from dcpsvc.state import dcp_quirks, documents
from dcpsvc.state.dtypes import dtype_of
from dcpsvc.state.saved import Want
from dcpsvc.tools.folder import Folder
from dcpsvc.tools.showing import show

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from dcpsvc.storage.base import Store
    from dcpsvc.tools.exporting import Source

_SCRATCH = ".dcpsvc-scratch"
_BATCH_NBYTES = 256 << 20
_MAPPED_NBYTES = 1 << 20
"""What is smaller is kept in memory: a process may map 65,530 things at a time."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def export_dcp(
    store: Store,
    step: int,
    directory: str | os.PathLike[str],
    *,
    component: str = "",
    dtype: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """A directory that plain ``torch.distributed.checkpoint.load`` reads: all tensors and JSON values, by our names.

    Args:
        store: The run root.
        step: Of a commit.
        directory: Empty, or not there.
        component: Only its tensors, by their names in the module, as torchtitan calls them.
        dtype: Floating-point tensors are cast to it.
        progress: Called with the bytes just read.

    Raises:
        NoSuchStepError: The step is not committed, or damaged.
        ExportError: The directory holds something else.
        CorruptShardError: The checkpoint is damaged; names the file.
    """
    shown = show(store, step)
    reader = CheckpointReader(shown.manifest, shown.layout, [store])
    about = {"run_id": shown.manifest.run_id, "step": step, "attempt": shown.manifest.attempt, "format": "dcp"}
    keys = [key for key in shown.layout.names() if not component or key.startswith(f"{component}.")]
    if component and not keys:
        raise ExportError(f"{store.url} step {step}", f"no tensors below {component!r}")
    folder = Folder(directory, about | {"component": component, "dtype": dtype})
    dcp_quirks.quiet()
    with held(store, shown.manifest.key), _scratch(folder.path) as scratch:
        found = _mapped(reader, keys, scratch / "state", progress)
        cast = _cast(found, dtype)
        state: dict[str, Any] = {key: cast[shown.layout.aliases.get(key, key)] for key in keys}  # DCP knows no ties
        if component:
            state = {key.removeprefix(f"{component}."): tensor for key, tensor in state.items()}
        else:
            state |= _values(reader, state)
        writer = FileSystemWriter(folder.path, single_file_per_rank=True, overwrite=True)
        save(state, storage_writer=writer, no_dist=True)
        del state, cast, found
    _sync(folder.path)
    folder.finish()


def export_torch(
    source: Source,
    store: Store,
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """``model.pt`` with the module's state dict; tied weights are one tensor in it.

    Raises:
        ExportError: The directory holds something else.
        CorruptShardError: The checkpoint is damaged; names the file.
    """
    folder = Folder(directory, {"format": "torch", "dtype": dtype, "component": source.component} | source.identity())
    reader = CheckpointReader(source.manifest, source.layout, [store])
    prefix = f"{source.component}."
    keys = [key for key in source.layout.names() if key.startswith(prefix)]
    with source.held(), _scratch(folder.path) as scratch:
        found = _mapped(reader, keys, scratch / "state", progress)
        cast = _cast(found, dtype)
        tied = {key: cast[source.layout.aliases.get(key, key)] for key in keys}
        state = OrderedDict((key.removeprefix(prefix), tied[key]) for key in keys)
        target = folder.path / "model.pt.partial"
        with target.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        target.replace(folder.path / "model.pt")
        del found, cast, tied, state
    folder.finish()


def _cast(tensors: dict[str, torch.Tensor], dtype: str | None) -> dict[str, torch.Tensor]:
    wanted = _DTYPES.get(dtype or "")
    return {key: t.to(wanted) if wanted and t.is_floating_point() else t for key, t in tensors.items()}


def _sync(folder: Path) -> None:
    """DCP syncs ``.metadata`` before its last bytes are out of Python's buffer."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def _scratch(folder: Path) -> Generator[Path]:
    """An empty directory of a fixed name: what an export that was killed left in it goes first."""
    path = folder / _SCRATCH
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _mapped(
    reader: CheckpointReader, keys: list[str], path: Path, progress: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    """Every tensor, verified; large ones in a file that is mapped: the kernel keeps of it what there is room for."""
    stored = sorted({reader.layout.aliases.get(key, key) for key in keys})
    wants = [Want(key, (0,) * len(reader.layout.tensors[key].shape), _room(reader, key, path)) for key in stored]
    batch: list[Want] = []
    for want in wants:
        batch.append(want)
        if sum(one.out.nbytes for one in batch) >= _BATCH_NBYTES:
            read(reader, batch)
            batch = []
        progress(want.out.nbytes)
    read(reader, batch)
    return {want.key: want.out for want in wants}


def _room(reader: CheckpointReader, key: str, path: Path) -> torch.Tensor:
    tensor = reader.layout.tensors[key]
    if tensor.nbytes < _MAPPED_NBYTES:
        return torch.empty(tensor.shape, dtype=dtype_of(tensor.dtype))
    begin = -(-path.stat().st_size // mmap.PAGESIZE) * mmap.PAGESIZE if path.exists() else 0
    with path.open("ab") as file:
        file.truncate(begin + tensor.nbytes)
    data = np.memmap(path, dtype=np.uint8, mode="r+", offset=begin, shape=(tensor.nbytes,))
    return torch.from_numpy(data).view(dtype_of(tensor.dtype)).view(tensor.shape)


def _values(reader: CheckpointReader, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """JSON values by their dotted names, as DCP would have flattened them; the tensors in them stand by themselves."""
    found: dict[str, Any] = {}
    for name, document in reader.documents(*range(reader.manifest.world_size)).items():
        for path, leaf in documents.leaves(document, name).items():
            if path not in tensors:
                found[path] = documents.decode(leaf, path, tensors.__getitem__)
    return found
