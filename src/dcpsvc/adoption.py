"""What torch wrote, to be made a checkpoint: a stock DCP directory, or one file of ``torch.save``.

Nothing in them is executed. DCP's ``.metadata`` is a pickle: it is read with nothing at hand but inert records of DCP's
own kinds; tensors are read by torch with ``weights_only=True``. What needs more is refused.
"""

from __future__ import annotations

import io
import pickle
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dcpsvc.errors import ForeignFormatError
from dcpsvc.state.dtypes import name_of
from dcpsvc.tools.foreign import READ_NBYTES, Foreign, Found, state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

_MAX_METADATA_NBYTES = 2 << 30


def find_dcp(path: Path) -> Found:
    """A directory of ``torch.distributed.checkpoint.save``, written by any number of ranks. Chunks stay chunks.

    Raises:
        ForeignFormatError: It is damaged, compressed, or needs code to be read.
    """
    metadata = _metadata(path / ".metadata")
    places = {(at.fqn, tuple(getattr(at, "offset", ()))): where for at, where in metadata.storage_data.items()}
    tensors: list[Foreign] = []
    left: list[str] = []
    values: dict[str, Callable[[], Any]] = {}
    for name, where in ((at.fqn, where) for at, where in metadata.storage_data.items()):
        if not hasattr(metadata.state_dict_metadata.get(name), "chunks"):
            values[name] = partial(_value, path, name, where)
    for name, entry in sorted(metadata.state_dict_metadata.items()):
        if not hasattr(entry, "chunks"):
            left.append(name)
            continue
        dtype, shape = name_of(entry.properties.dtype, name), tuple(entry.size)
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            where = places.get((name, offsets))
            if where is None or getattr(where, "transform_descriptors", None):
                raise ForeignFormatError(str(path), f"{name}: its chunk at {offsets} is not there, or compressed")
            read = partial(_chunk, path, name, where, (dtype, sizes))
            tensors.append(Foreign(name, dtype, shape, offsets, sizes, read))
    files = sorted(path.glob("*.distcp"))
    return Found("dcp", path, tuple(tensors), {}, {}, tuple(left), state_of([path / ".metadata", *files]), values)


def find_torch(path: Path) -> Found:
    """A file of ``torch.save``: every tensor in nested dicts, by dotted names; mapped, not read.

    Raises:
        ForeignFormatError: It is not one, or holds objects that only code can make.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as err:
        reason = f"cannot be read without executing what is in it: {_said(err)}"
        hint = "load it where you trust it, and torch.save its tensors, in dicts, anew"
        raise ForeignFormatError(str(path), f"{reason}; {hint}") from err
    flat: dict[str, torch.Tensor] = {}
    left: list[str] = []
    _flatten(content, "", flat, left)
    values = {name: partial(_plain, content, name) for name in left}
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    tensors: list[Foreign] = []
    for name, tensor in flat.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(place, name) != name:
            aliases[name] = first[place]
            continue
        shape = tuple(tensor.shape)
        dtype = name_of(tensor.dtype, name)
        tensors.append(Foreign(name, dtype, shape, (0,) * len(shape), shape, partial(_tensor, tensor)))
    return Found("torch", path, tuple(tensors), aliases, {}, tuple(left), state_of([path]), values)


def _flatten(value: Any, name: str, into: dict[str, torch.Tensor], left: list[str]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, f"{name}.{key}" if name else str(key), into, left)
    elif isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized:
        into[name] = value.detach()
    else:
        left.append(name)


def _plain(content: Any, name: str) -> Any:
    """What lies at a dotted name in nested dicts."""
    for key, item in content.items():
        here = str(key)
        if here == name:
            return item
        if isinstance(item, dict) and name.startswith(f"{here}."):
            return _plain(item, name[len(here) + 1 :])
    raise KeyError(name)


def _tensor(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Its bytes, some rows at a time where it is not contiguous."""
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        rows = max(1, READ_NBYTES * tensor.shape[0] // max(1, tensor.nbytes)) if tensor.dim() else 1
        for part in tensor.split(rows) if tensor.dim() else [tensor]:
            yield from _tensor(part.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format))
        return
    flat = tensor.reshape(-1).view(torch.uint8)
    for begin in range(0, flat.numel(), READ_NBYTES):
        yield flat[begin : begin + READ_NBYTES].numpy().data


def _chunk(path: Path, name: str, where: Any, expected: tuple[str, tuple[int, ...]]) -> Iterator[memoryview]:
    """A chunk of a DCP file, which is a file of ``torch.save`` within it."""
    tensor = _value(path, name, where)
    if not isinstance(tensor, torch.Tensor) or (name_of(tensor.dtype, name), tuple(tensor.shape)) != expected:
        reason = f"{name}: holds no tensor of {expected[0]}{list(expected[1])}"
        raise ForeignFormatError(str(path / str(where.relative_path)), reason)
    yield from _tensor(tensor.detach())


def _value(path: Path, name: str, where: Any) -> Any:
    """What lies there, as far as torch makes it without executing anything."""
    file = path / str(where.relative_path)
    if file.parent != path or not file.is_file():
        raise ForeignFormatError(str(path), f"{name} is said to lie in {where.relative_path}, which is no file in it")
    with file.open("rb") as opened:
        opened.seek(int(where.offset))
        data = opened.read(int(where.length))
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as err:
        raise ForeignFormatError(str(file), f"{name}: {_said(err)}") from err


def _said(err: Exception) -> str:
    """The line of torch's message that names what it found."""
    lines = str(err).splitlines() or [type(err).__name__]
    return next((line for line in lines if "GLOBAL" in line), lines[0]).strip()[:200]


class _Record:
    """What a pickled object of DCP says, and nothing it does."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple):  # TensorProperties
            self.dtype = state[0]
        else:
            self.__dict__.update(state)


_DCP = "torch.distributed.checkpoint"
_RECORDS: Mapping[tuple[str, str], Any] = {
    (f"{_DCP}.metadata", name): type(name, (_Record,), {})
    for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "StorageMeta", "MetadataIndex",
    )
} | {
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): lambda *_: None,
    (f"{_DCP}.filesystem", "_StorageInfo"): type("_StorageInfo", (_Record,), {}),
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda *_: None,
    ("pathlib", "PosixPath"): lambda *parts: parts,
}  # fmt: skip


class _Inert(pickle.Unpickler):
    """Makes records and dtypes; whatever else a pickle asks for is refused before anything is called."""

    def find_class(self, module: str, name: str) -> Any:
        """Only what is listed."""
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) not in _RECORDS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _RECORDS[module, name]


def _metadata(path: Path) -> Any:
    if path.stat().st_size > _MAX_METADATA_NBYTES:
        raise ForeignFormatError(str(path), f"{path.stat().st_size} bytes")
    try:
        with path.open("rb") as file:
            found = _Inert(file).load()
        _ = found.state_dict_metadata, found.storage_data
    except Exception as err:  # a damaged pickle raises anything
        raise ForeignFormatError(str(path), f"no metadata of torch.distributed.checkpoint: {err}") from err
    return found
