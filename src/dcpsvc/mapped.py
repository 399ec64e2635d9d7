"""The tensors of a checkpoint in one file that is mapped into memory: what is whole of it outlives a kill.

Beside the file lies a list: which tensor has been put there, with the digest of its bytes. Only what still has that
digest is taken as read, so nothing of it need be synced, and what a lost machine left is found out.
"""

from __future__ import annotations

import contextlib
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dcpsvc.format.digest import digest
from dcpsvc.format.layout import ITEM_NBYTES
from dcpsvc.format.parse import compact
from dcpsvc.reader import read
from dcpsvc.state.dtypes import dtype_of
from dcpsvc.state.saved import Want
from dcpsvc.tools.casting import result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from dcpsvc.format.layout import Tensor
    from dcpsvc.reader import CheckpointReader

_ALIGNED = 64


def mapped(
    folder: Path,
    reader: CheckpointReader,
    keys: Sequence[str],
    *,
    dtype: str | None,
    batch_nbytes: int,
    progress: Callable[[int], None],
) -> dict[str, torch.Tensor]:
    """Each stored tensor of some keys, verified; the kernel keeps in memory of them what there is room for.

    Args:
        folder: Where the file and its list are: one of the same checkpoint, keys and dtype, or none.
        reader: Of the checkpoint.
        keys: Names of tensors; of tied ones the first name is in the result.
        dtype: Floating-point tensors are cast to it.
        batch_nbytes: What is read at once; a kill loses no more.
        progress: Called with the bytes just read, or found.

    Raises:
        CorruptShardError: The checkpoint is damaged; names the file.
    """
    folder.mkdir(exist_ok=True)
    stored = {name: reader.layout.tensors[name] for name in sorted({reader.layout.aliases.get(k, k) for k in keys})}
    found = _rooms(folder / "state", stored, dtype)
    listed = folder / "parts.jsonl"
    whole = _listed(listed)
    missing = {name: stored[name] for name, there in found.items() if whole.get(name) != _digest(there)}
    progress(sum(tensor.nbytes for name, tensor in stored.items() if name not in missing))
    with listed.open("ab") as file:
        file.write(b"\n")  # a line that was cut short ends here
        for batch in _batches(missing, batch_nbytes):
            _read(reader, batch, found)
            file.writelines(compact({"key": name, "digest": _digest(found[name])}) + b"\n" for name in batch)
            file.flush()
            progress(sum(stored[name].nbytes for name in batch))
    return found


def _rooms(path: Path, stored: dict[str, Tensor], dtype: str | None) -> dict[str, torch.Tensor]:
    """A place in the file for each, by itself: a storage of its own, for what writes storages, and one map for all."""
    begins: dict[str, int] = {}
    end = 0
    for name, tensor in stored.items():
        begins[name] = -(-end // _ALIGNED) * _ALIGNED
        end = begins[name] + _nbytes(tensor, dtype)
    with path.open("ab") as file:
        file.truncate(max(end, 1))
    data = np.memmap(path, dtype=np.uint8, mode="r+")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        flat = torch.from_numpy(data[begins[name] : begins[name] + _nbytes(tensor, dtype)])
        found[name] = flat.view(dtype_of(result(tensor.dtype, dtype))).view(tensor.shape)
    return found


def _nbytes(tensor: Tensor, dtype: str | None) -> int:
    return math.prod(tensor.shape) * ITEM_NBYTES[result(tensor.dtype, dtype)]


def _batches(missing: dict[str, Tensor], nbytes: int) -> Iterator[dict[str, Tensor]]:
    batch: dict[str, Tensor] = {}
    for name, tensor in missing.items():
        batch[name] = tensor
        if sum(one.nbytes for one in batch.values()) >= nbytes:
            yield batch
            batch = {}
    if batch:
        yield batch


def _read(reader: CheckpointReader, batch: dict[str, Tensor], found: dict[str, torch.Tensor]) -> None:
    """Straight to its place, or cast on the way there."""
    kinds = {name: dtype_of(tensor.dtype) for name, tensor in batch.items()}
    outs = {
        name: found[name] if found[name].dtype == kind else torch.empty(batch[name].shape, dtype=kind)
        for name, kind in kinds.items()
    }
    read(reader, [Want(name, (0,) * out.dim(), out) for name, out in outs.items()])
    for name, out in outs.items():
        if out is not found[name]:
            found[name].copy_(out)


def _listed(path: Path) -> dict[str, str]:
    """What an export that was killed has said; a line that it did not finish says nothing."""
    found: dict[str, str] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            said: Any = json.loads(line)
            found[said["key"]] = said["digest"]
    return found


def _digest(tensor: torch.Tensor) -> str:
    return digest(tensor.reshape(-1).view(torch.uint8).numpy().data)
