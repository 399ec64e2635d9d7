"""A checkpoint in torch's own formats: a stock DCP directory, or one file of ``torch.save``.

What is read goes through a file that is mapped into memory, so the state need not fit into it.
"""

from __future__ import annotations

import mmap
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from dcpsvc.leases import held
from dcpsvc.reader import CheckpointReader, read
from dcpsvc.state import dcp_quirks, documents
from dcpsvc.state.dtypes import dtype_of
from dcpsvc.state.saved import Want
from dcpsvc.tools.folder import Folder
from dcpsvc.tools.showing import show

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from dcpsvc.storage.base import Store
    from dcpsvc.tools.exporting import Source

_BATCH_NBYTES = 256 << 20
_MAPPED_NBYTES = 1 << 20
"""What is smaller is kept in memory: a process may map 65,530 things at a time."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def export_dcp(
    store: Store, step: int, directory: str | os.PathLike[str], *, progress: Callable[[int], None] = lambda _: None
) -> None:
    """A directory that plain ``torch.distributed.checkpoint.load`` reads: all tensors and JSON values, by our names.

    Raises:
        NoSuchStepError: The step is not committed, or damaged.
        ExportError: The directory holds something else.
        CorruptShardError: The checkpoint is damaged; names the file.
    """
    shown = show(store, step)
    reader = CheckpointReader(shown.manifest, shown.layout, [store])
    about = {"run_id": shown.manifest.run_id, "step": step, "attempt": shown.manifest.attempt, "format": "dcp"}
    folder = Folder(directory, about)
    dcp_quirks.quiet()
    with held(store, shown.manifest.key), tempfile.TemporaryDirectory(dir=folder.path) as scratch:
        state: dict[str, Any] = _mapped(reader, list(shown.layout.names()), Path(scratch) / "state", progress)
        state |= {name: state[of] for name, of in shown.layout.aliases.items()}  # DCP knows no ties
        state |= _values(reader, state)
        writer = FileSystemWriter(folder.path, single_file_per_rank=True, overwrite=True)
        save(state, storage_writer=writer, no_dist=True)
        del state
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
    wanted = _DTYPES.get(dtype or "")
    with source.held(), tempfile.TemporaryDirectory(dir=folder.path) as scratch:
        found = _mapped(reader, keys, Path(scratch) / "state", progress)
        cast = {key: t.to(wanted) if wanted and t.is_floating_point() else t for key, t in found.items()}
        tied = {key: cast[source.layout.aliases.get(key, key)] for key in keys}
        state = OrderedDict((key.removeprefix(prefix), tied[key]) for key in keys)
        target = folder.path / "model.pt.partial"
        torch.save(state, target)
        target.replace(folder.path / "model.pt")
        del found, cast, tied, state
    folder.finish()


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
