"""A checkpoint in torch's own formats: a stock DCP directory, or one file of ``torch.save``.

What is read goes through a file that is mapped into memory, so the state need not fit into it, and what an export that
was killed had read is not read again. The result is put together of that file, under its name when it is whole.
"""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict_saver import save

from dcpsvc.errors import ExportError
from dcpsvc.format.shardfile import of_components
from dcpsvc.leases import held
from dcpsvc.mapped import mapped
from dcpsvc.reader import CheckpointReader
from dcpsvc.state import dcp_quirks, documents
from dcpsvc.tools.folder import Folder
from dcpsvc.tools.showing import show

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dcpsvc.format.layout import Layout
    from dcpsvc.storage.base import Store
    from dcpsvc.tools.exporting import Source

_SCRATCH, _FILE = ".dcpsvc-scratch", "model.pt"
_BATCH_NBYTES = 256 << 20


def export_dcp(
    store: Store,
    step: int,
    directory: str | os.PathLike[str],
    *,
    attempt: str | None = None,
    component: str = "",
    flat: bool = False,
    dtype: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
    batch_nbytes: int = _BATCH_NBYTES,
) -> None:
    """A directory that plain ``torch.distributed.checkpoint.load`` reads: all tensors and JSON values, by our names.

    Args:
        store: The run root.
        step: Of a commit.
        directory: Empty, not there, or one that the same export began.
        attempt: Which of the step; None: the newest.
        component: Only its tensors, by their names in the module.
        flat: As torchtitan lays a whole checkpoint out: the tensors of ``component``, or of ``model``, by their names
            in the module, and beside them everything else, with hyper-parameters by the name of each parameter.
        dtype: Floating-point tensors are cast to it.
        progress: Called with the bytes just read, or found.
        batch_nbytes: What is read at once; a kill loses no more.

    Raises:
        NoSuchStepError: The step is not committed, or damaged.
        ExportError: The directory holds something else.
        CorruptShardError: The checkpoint is damaged; names the file.
    """
    shown = show(store, step, attempt)
    reader = CheckpointReader(shown.manifest, shown.layout, [store])
    about = {"run_id": shown.manifest.run_id, "step": step, "attempt": shown.manifest.attempt, "format": "dcp"}
    component = component or ("model" if flat else "")
    keys = _below(shown.layout, component)
    if component and not keys:
        raise ExportError(f"{store.url} step {step}", f"no tensors below {component!r}")
    keys = shown.layout.names() if flat else keys
    folder = Folder(directory, about | {"component": component, "dtype": dtype, "flat": flat})
    if not folder.has(".metadata"):
        with held(store, shown.manifest.key):
            scratch = folder.path / _SCRATCH
            found = mapped(scratch, reader, keys, dtype=dtype, batch_nbytes=batch_nbytes, progress=progress)
            state: dict[str, Any] = {
                key: found[shown.layout.aliases.get(key, key)] for key in keys
            }  # DCP knows no ties
            if flat or not component:
                state |= _values(reader, state, _by_parameter if flat else documents.values)
            if component:
                state = {key.removeprefix(f"{component}."): value for key, value in state.items()}
            _write_dcp(folder.path, state, shown.manifest.attempt)
            del state, found
    _finish(folder)


def planned_nbytes(layout: Layout, component: str = "") -> int:
    """What an export of a component reads, or of all; tied tensors once."""
    return sum(layout.tensors[name].nbytes for name in {layout.aliases.get(k, k) for k in _below(layout, component)})


def _below(layout: Layout, component: str) -> list[str]:
    prefix = f"{component}." if component else ""
    return [key for key in layout.names() if key.startswith(prefix)]


def export_torch(
    source: Source,
    store: Store,
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
    batch_nbytes: int = _BATCH_NBYTES,
) -> None:
    """``model.pt`` with the module's state dict; tied weights are one tensor in it.

    Raises:
        ExportError: The directory holds something else.
        CorruptShardError: The checkpoint is damaged; names the file.
    """
    folder = Folder(directory, {"format": "torch", "dtype": dtype, "component": source.component} | source.identity())
    reader = CheckpointReader(source.manifest, source.layout, [store])
    prefix, keys = f"{source.component}.", _below(source.layout, source.component)
    if not folder.has(_FILE):
        with source.held():
            scratch = folder.path / _SCRATCH
            found = mapped(scratch, reader, keys, dtype=dtype, batch_nbytes=batch_nbytes, progress=progress)
            tied = {key: found[source.layout.aliases.get(key, key)] for key in keys}
            _write_file(folder.path, OrderedDict((key.removeprefix(prefix), tied[key]) for key in keys))
            del found, tied
    _finish(folder)


class _Writer(FileSystemWriter):
    """The directory it is moved to then, and the attempt, are what it says it has written."""

    def __init__(self, path: Path, target: Path, attempt: str) -> None:
        super().__init__(path, single_file_per_rank=True, overwrite=True)
        self._said = StorageMeta(checkpoint_id=str(target), save_id=attempt)

    def storage_meta(self) -> StorageMeta:
        return self._said


def _write_dcp(folder: Path, state: dict[str, Any], attempt: str) -> None:
    """Written aside, synced, and moved into place, ``.metadata`` last: until then it is no checkpoint of DCP."""
    dcp_quirks.quiet()
    aside = folder / _SCRATCH / "dcp"
    shutil.rmtree(aside, ignore_errors=True)
    save(state, storage_writer=_Writer(aside, folder, attempt), no_dist=True)
    for path in sorted(aside.iterdir(), key=lambda path: path.name == ".metadata"):
        _sync(path)  # DCP syncs .metadata before its last bytes are out of Python's buffer
        path.replace(folder / path.name)


def _write_file(folder: Path, state: dict[str, torch.Tensor]) -> None:
    aside = folder / _SCRATCH / _FILE
    torch.save(state, aside)
    _sync(aside)
    aside.replace(folder / _FILE)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _finish(folder: Folder) -> None:
    """The result is whole; a kill from here on leaves that."""
    shutil.rmtree(folder.path / _SCRATCH, ignore_errors=True)
    folder.finish()


def _values(
    reader: CheckpointReader, tensors: dict[str, torch.Tensor], flattened: Callable[[Any, str], dict[str, Any]]
) -> dict[str, Any]:
    """JSON values by their dotted names, as DCP would have flattened them; the tensors in them stand by themselves."""
    found: dict[str, Any] = {}
    for name, document in of_components(reader.documents(*range(reader.manifest.world_size))).items():
        for path, leaf in flattened(document, name).items():
            if path not in tensors and not _is_shared(name, path, leaf):
                found[path] = documents.decode(leaf, path, tensors.__getitem__)
    return found


def _is_shared(name: str, path: str, leaf: Any) -> bool:
    """Whether a leaf of one rank is a tensor of all, as an optimizer's under FSDP1: that stands by itself."""
    return documents.tensor_names(leaf) == [name.partition("@")[0] + path.removeprefix(name)]


def _by_parameter(document: Any, name: str) -> dict[str, Any]:
    """As ``flatten_optimizer_state_dict=True`` has an optimizer, with its groups by parameter; other leaves as ever."""
    if not (isinstance(document, dict) and document.keys() >= {"state", "shapes", "param_groups"}):
        return documents.values(document, name)
    optimizer = name.partition("@")[0]  # of ranks with different parameters each has a part of it
    values = {
        f"{optimizer}.param_groups.{parameter}.{key}": value
        for group in document["param_groups"]
        for parameter in group["params"]
        for key, value in group.items()
        if key != "params"
    }
    return values | documents.values(document["state"], f"{optimizer}.state")
