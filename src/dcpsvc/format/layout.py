"""The layout: FQN -> chunks -> place in a shard. Static while the structure of the state is the same."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dcpsvc.errors import LayoutError
from dcpsvc.format.digest import digest
from dcpsvc.format.manifest import FORMAT, MAX_RANKS, MAX_SHARD_NBYTES
from dcpsvc.format.parse import Fields, compact
from dcpsvc.garbage import uncollected

MAX_NBYTES = 4 << 30
MAX_DIMS = 64
MAX_CUT_DIMS = 8

ITEM_NBYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
    "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1, "C128": 16,
}  # fmt: skip
"""Bytes per element of each dtype, by its safetensors name, or one in its manner."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of one tensor, and where its bytes lie (row major) in one rank's file.

    Attributes:
        rank: Whose shard.
        offsets: Where the box begins in the tensor, per dimension.
        sizes: Its extent, per dimension.
        begin: First byte in the file.
    """

    rank: int
    offsets: Shape
    sizes: Shape
    begin: int

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.sizes)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the state, cut into chunks that cover it exactly."""

    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * ITEM_NBYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Layout:
    """Every tensor of a checkpoint. ``aliases`` are further names of tensors stored once (tied weights)."""

    tensors: dict[str, Tensor]
    aliases: dict[str, str] = field(default_factory=dict[str, str])

    def find(self, key: str) -> Tensor | None:
        """The tensor a name stands for, aliases followed; None where there is none."""
        return self.tensors.get(self.aliases.get(key, key))

    def names(self) -> list[str]:
        """Every loadable tensor name, aliases included."""
        return sorted([*self.tensors, *self.aliases])

    def dumps(self) -> bytes:
        """The file's content; equal layouts give equal bytes."""
        with uncollected():
            tensors = {
                key: [t.dtype, t.shape, [[c.rank, c.offsets, c.sizes, c.begin] for c in t.chunks]]
                for key, t in sorted(self.tensors.items())
            }
            return compact({"format": FORMAT, "aliases": dict(sorted(self.aliases.items())), "tensors": tensors})


def loads(path: str, data: bytes, expected_digest: str) -> Layout:
    """Parse and validate a layout.

    Raises:
        LayoutError: The bytes do not have the digest, or chunks do not cover their tensor.
    """
    if (found := digest(data)) != expected_digest:
        raise LayoutError(path, f"checksum is {found}, the manifest says {expected_digest}")
    with uncollected():
        return _parsed(path, data)


def _parsed(path: str, data: bytes) -> Layout:
    fields = Fields.parse(path, data, LayoutError)
    if (version := fields.get("format", int)) != FORMAT:
        raise fields.fail(f"format version {version}, this package reads {FORMAT}")
    tensors = {key: _tensor(fields, key, value) for key, value in fields.child("tensors").items()}
    aliases = {str(key): str(value) for key, value in fields.child("aliases").items()}
    if dangling := [name for name, target in aliases.items() if target not in tensors]:
        raise fields.fail(f"alias {dangling[0]!r} stands for no tensor")
    return Layout(tensors, aliases)


def uncovered(tensor: Tensor) -> str | None:
    """Why the chunks are no exact cover of their tensor; None if they are."""
    stored = sum(chunk.numel for chunk in tensor.chunks)
    if stored != math.prod(tensor.shape):
        why = "; ranks that hold the same Part have to give it their group" if stored > math.prod(tensor.shape) else ""
        return f"chunks hold {stored} of {math.prod(tensor.shape)} elements{why}"
    for chunk in tensor.chunks:
        box = zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)
        if any(offset + size > extent for offset, size, extent in box):
            return f"a chunk at {chunk.offsets} of size {chunk.sizes} leaves the shape {tensor.shape}"
    return _not_tiled(tensor)


def _not_tiled(tensor: Tensor) -> str | None:
    """Boxes tile a box exactly when their corners, counted with alternating signs, are those of the whole."""
    chunks = [chunk for chunk in tensor.chunks if chunk.numel]
    cut = [dim for dim, extent in enumerate(tensor.shape) if any(chunk.sizes[dim] != extent for chunk in chunks)]
    if len(cut) > MAX_CUT_DIMS:
        return f"cut along {len(cut)} dimensions, at most {MAX_CUT_DIMS} are supported"
    if len(cut) == 1:
        return _not_in_a_row(chunks, cut[0])
    corners: Counter[Shape] = Counter()
    whole = [((0,) * len(tensor.shape), tensor.shape, -1)] if chunks else []
    for offsets, sizes, sign in [*((c.offsets, c.sizes, 1) for c in chunks), *whole]:
        for far in itertools.product((False, True), repeat=len(cut)):
            corner = tuple(offsets[dim] + sizes[dim] * at_end for dim, at_end in zip(cut, far, strict=True))
            corners[corner] += sign * (-1) ** sum(far)
    if any(corners.values()):
        return "chunks overlap and leave gaps"
    return None


def _not_in_a_row(chunks: list[Chunk], dim: int) -> str | None:
    """The same for boxes that are cut along one dimension, as nearly all are; they hold as much as the whole."""
    ends = 0
    for offset, size in sorted((chunk.offsets[dim], chunk.sizes[dim]) for chunk in chunks):
        if offset != ends:
            return "chunks overlap and leave gaps"
        ends += size
    return None


def _tensor(fields: Fields, key: str, value: Any) -> Tensor:
    try:
        dtype, shape, chunks = value
        tensor = Tensor(dtype, _shape(shape), tuple(_chunk(*chunk) for chunk in chunks))
        if dtype not in ITEM_NBYTES:
            raise fields.fail(f"{key}: unknown dtype {dtype!r}")
        reason = uncovered(tensor)
    except (TypeError, ValueError) as err:
        raise fields.fail(f"{key}: {err}") from err
    if reason:
        raise fields.fail(f"{key}: {reason}")
    return tensor


def _chunk(rank: Any, offsets: Any, sizes: Any, begin: Any) -> Chunk:
    return Chunk(_count(rank, MAX_RANKS), _shape(offsets), _shape(sizes), _count(begin, MAX_SHARD_NBYTES))


def _shape(value: Any) -> Shape:
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        raise ValueError(f"not a shape: {value!r:.80}")
    return tuple(_count(extent, MAX_SHARD_NBYTES) for extent in value)


def _count(value: Any, maximum: int) -> int:
    if type(value) is not int or not 0 <= value <= maximum:
        raise ValueError(f"not a count: {value!r:.80}")
    return value
