"""Tensors that other libraries wrote as safetensors: model folders of transformers, adapters of PEFT. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import ForeignFormatError
from dcpsvc.format.layout import ITEM_NBYTES
from dcpsvc.format.shardfile import MAX_HEADER_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from dcpsvc.format.layout import Shape

READ_NBYTES = 32 << 20
"""Held at a time."""
_MAX_JSON_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Foreign:
    """A tensor, or a box of one, in somebody else's file.

    Attributes:
        name: Of the whole tensor, in the model.
        dtype: As safetensors calls it.
        shape: Of the whole tensor.
        offsets: Where the box begins in it.
        sizes: The box's extent.
        read: Gives its bytes, row major, some at a time.
    """

    name: str
    dtype: str
    shape: Shape
    offsets: Shape
    sizes: Shape
    read: Callable[[], Iterator[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        """Of the box."""
        return math.prod(self.sizes) * ITEM_NBYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Found:
    """What there is to take.

    Attributes:
        kind: ``hf``, ``peft``, ``dcp`` or ``torch``.
        path: Where it lies.
        tensors: All of it.
        aliases: Further names of tied tensors.
        about: What the module's document is to say: configurations.
        left: Names of what is no tensor, and is left.
        state: What changes when the files do.
        values: What gives what is no tensor, in the order in which it was saved, executing nothing.
    """

    kind: str
    path: Path
    tensors: tuple[Foreign, ...]
    aliases: Mapping[str, str]
    about: Mapping[str, Any]
    left: tuple[str, ...]
    state: tuple[tuple[str, int, int], ...]
    values: Mapping[str, Callable[[], Any]] = field(default_factory=dict[str, "Callable[[], Any]"])

    def chosen(self, prefix: str, rename: Mapping[str, str], *, but: str = "") -> Found:
        """Only what lies below a dotted beginning, without it; then with some beginnings renamed.

        Args:
            prefix: The beginning; empty: everything.
            rename: Beginnings, and what they are called here.
            but: A beginning of what is left out: an optimizer that is taken by itself.

        Raises:
            ForeignFormatError: Nothing does, or two tensors would have one name.
        """

        def named(name: str) -> str:
            return renamed(name.removeprefix(f"{prefix}.") if prefix else name, rename)

        def wanted(name: str) -> bool:
            return name.startswith(below) and not (but and name.startswith(f"{but}."))

        below = f"{prefix}." if prefix else ""
        tensors = tuple(replace(t, name=named(t.name)) for t in self.tensors if wanted(t.name))
        if not tensors:
            there = sorted({tensor.name.split(".", 1)[0] for tensor in self.tensors})
            raise ForeignFormatError(str(self.path), f"no tensor below {prefix!r}; there are {', '.join(there[:8])}")
        boxes = [(tensor.name, tensor.offsets) for tensor in tensors]
        if len(set(boxes)) != len(boxes):
            twice = next(name for name, at in boxes if boxes.count((name, at)) > 1)
            raise ForeignFormatError(str(self.path), f"two tensors would be called {twice!r}")
        aliases = {named(name): named(of) for name, of in self.aliases.items() if wanted(name)}
        others = {t.name for t in self.tensors if not t.name.startswith(below)}
        left = tuple(name for name in (*self.left, *sorted(others)) if not (but and name.startswith(f"{but}.")))
        return replace(self, tensors=tensors, aliases=aliases, left=left)


def renamed(name: str, rename: Mapping[str, str]) -> str:
    """A name with the first of the beginnings that it has called otherwise."""
    for old, new in rename.items():
        if name == old or name.startswith(f"{old}."):
            return (new + name[len(old) :]).lstrip(".")
    return name


def kind_of(path: Path) -> str:
    """``hf``, ``peft``, ``dcp`` or ``torch``, by what there is.

    Raises:
        ForeignFormatError: None of them.
    """
    if (path / "adapter_config.json").is_file():
        return "peft"
    if (path / ".metadata").is_file():
        return "dcp"
    if path.suffix == ".safetensors" or any(path.glob("*.safetensors")):
        return "hf"
    if path.is_file():
        return "torch"
    wanted = "a folder of safetensors, of PEFT or of torch.distributed.checkpoint, or a file of torch.save"
    raise ForeignFormatError(str(path), f"is none of {wanted}")


def find_hf(path: Path) -> Found:
    """A model of transformers, or any folder of safetensors files: all that its index names, or all files.

    Raises:
        ForeignFormatError: A file does not say what it should, or a tensor that the index names is not there.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    folder = path.parent if path.is_file() else path
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None) if path.is_dir() else None
    wanted: dict[str, str] | None = None
    if index is not None:
        wanted = {str(name): str(file) for name, file in _json(index).get("weight_map", {}).items()}
        files = [folder / name for name in sorted(set(wanted.values()))]
    tensors: list[Foreign] = []
    for file in files:
        if file.parent != folder or not file.is_file():
            raise ForeignFormatError(str(folder), f"its index names {file.name}, which is no file in it")
        found = list(safetensors(file))
        tensors += [tensor for tensor in found if wanted is None or wanted.get(tensor.name) == file.name]
    if wanted is not None and (lacking := sorted(wanted.keys() - {tensor.name for tensor in tensors})):
        raise ForeignFormatError(str(index), f"it names {lacking[0]}, which is not in {wanted[lacking[0]]}")
    config = folder / "config.json"
    about = {"config": _json(config)} if path.is_dir() and config.is_file() else {}
    return Found("hf", path, tuple(tensors), {}, about, (), state_of(files))


def find_peft(path: Path, adapter: str = "default") -> Found:
    """An adapter, by the names it has in a model of PEFT.

    Raises:
        ForeignFormatError: It is no LoRA, or a file does not say what it should.
    """
    config = _json(path / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ForeignFormatError(str(path), f"an adapter of type {config.get('peft_type')}; only LORA is taken")
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        raise ForeignFormatError(str(path), "no adapter_model.safetensors; adapter_model.bin is a pickle: save it anew")
    kept = tuple(str(name) for name in config.get("modules_to_save") or ())
    tensors = tuple(replace(t, name=_in_model(t.name, adapter, kept, path)) for t in safetensors(file))
    return Found("peft", path, tensors, {}, {"peft": {"": {adapter: config}}}, (), state_of([file]))


def safetensors(path: Path) -> Iterator[Foreign]:
    """The tensors of a file, none of them read.

    Raises:
        ForeignFormatError: It is not one, or is cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_NBYTES or length + 8 > size:
            raise ForeignFormatError(str(path), f"no safetensors file: a header of {length} bytes in {size}")
        text = file.read(length)
    header = _parsed(path, text)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield _entry(path, str(name), entry, length + 8, size)


def _entry(path: Path, name: str, entry: Any, origin: int, size: int) -> Foreign:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(extent) for extent in entry["shape"])
        begin, end = (origin + int(at) for at in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as err:
        raise ForeignFormatError(str(path), f"{name}: a malformed entry: {err!r}") from err
    if dtype not in ITEM_NBYTES:
        raise ForeignFormatError(str(path), f"{name}: dtype {dtype} cannot be stored")
    if not origin <= begin <= end <= size or end - begin != math.prod(shape) * ITEM_NBYTES[dtype]:
        reason = f"{name}: bytes {begin} to {end} of a file of {size} for {dtype}{list(shape)}"
        raise ForeignFormatError(str(path), reason)
    return Foreign(name, dtype, shape, (0,) * len(shape), shape, partial(_bytes, path, begin, end))


def _bytes(path: Path, begin: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(begin)
        for at in range(begin, end, READ_NBYTES):
            data = file.read(min(READ_NBYTES, end - at))
            if len(data) != min(READ_NBYTES, end - at):
                raise ForeignFormatError(str(path), f"was cut short while it was read, at byte {at}")
            yield data


def _in_model(name: str, adapter: str, kept: tuple[str, ...], path: Path) -> str:
    """What PEFT's own loading makes of a name in a file: with the adapter's name behind what belongs to an adapter."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.startswith("lora_"):
            return ".".join([*parts[: at + 1], adapter, *parts[at + 1 :]])
        if part in kept:
            return ".".join([*parts[: at + 1], "modules_to_save", adapter, *parts[at + 1 :]])
    raise ForeignFormatError(str(path), f"{name} is of neither a LoRA layer nor modules_to_save")


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_NBYTES:
        raise ForeignFormatError(str(path), f"{path.stat().st_size} bytes of JSON")
    return _parsed(path, path.read_bytes())


def _parsed(path: Path, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise ForeignFormatError(str(path), f"not JSON: {err}") from err
    if not isinstance(found, dict):
        raise ForeignFormatError(str(path), "not a JSON object")
    return found


def state_of(files: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """What changes when the files do: their names, sizes and times."""
    return tuple((str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in files)
