"""A shard: one valid ``.safetensors`` file per rank and attempt.

::

    8 bytes   length of the header, little endian
    header    JSON, padded with spaces so that the data begins on a page
    tensors   in the order of their element size, so each is aligned
    objects   JSON documents, as the U8 tensor ``__dcpsvc__.objects``
    blocks    16 bytes per MiB of all the above, as the U8 tensor ``__dcpsvc__.blocks``

Offsets in a layout count from the beginning of the file. They depend only on names, dtypes and sizes,
never on a value, so a host buffer can be the image of the file.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import CorruptShardError, StateError
from dcpsvc.format.digest import table_nbytes
from dcpsvc.format.layout import ITEM_NBYTES
from dcpsvc.format.parse import Fields, compact

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dcpsvc.format.layout import Shape

OBJECTS = "__dcpsvc__.objects"
BLOCKS = "__dcpsvc__.blocks"
PAGE_NBYTES = 4096
MAX_HEADER_NBYTES = 100_000_000
"""What every safetensors reader accepts."""

FOREIGN = {
    "C128": ("F64", (2,)),
    "F8_E4M3FNUZ": ("U8", ()), "F8_E5M2FNUZ": ("U8", ()), "F8_E8M0": ("U8", ()),
}  # fmt: skip
"""What not every safetensors reader knows, and as what the header gives it: real and imaginary part, or bytes."""

_PREFIX_NBYTES = 8
_SLACK_NBYTES = 512
"""Room in the header for what changes between steps: step, attempt, and the sizes of objects and blocks."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One chunk this rank writes.

    Attributes:
        key: FQN of the tensor.
        dtype: Its safetensors name.
        shape: Shape of the whole tensor.
        offsets: Where the chunk begins in it.
        sizes: The chunk's extent.
    """

    key: str
    dtype: str
    shape: Shape
    offsets: Shape
    sizes: Shape

    @property
    def name(self) -> str:
        """Name in the file: the FQN for a whole tensor, ``fqn[0:512,0:64]`` for a part of one."""
        if self.sizes == self.shape:
            return self.key
        box = ",".join(f"{o}:{o + s}" for o, s in zip(self.offsets, self.sizes, strict=True))
        return f"{self.key}[{box}]"

    @property
    def nbytes(self) -> int:
        """Bytes of the chunk."""
        count = ITEM_NBYTES[self.dtype]
        for size in self.sizes:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Placement:
    """Where every piece of one rank's shard lies.

    Attributes:
        pieces: In file order.
        names: Theirs, in the file.
        begins: First byte of each piece, from the beginning of the file.
        data_begin: Where the header ends.
        tensors_end: Where the tensors end and the objects begin.
        described: What the header says about the pieces, as JSON: all that does not change between steps.
    """

    pieces: tuple[Piece, ...]
    names: tuple[str, ...]
    begins: tuple[int, ...]
    data_begin: int
    tensors_end: int
    described: bytes


def place(pieces: Iterable[Piece]) -> Placement:
    """Decide where each piece goes: widest elements first, then by name, without gaps."""
    named = sorted(((-ITEM_NBYTES[piece.dtype], piece.name, piece) for piece in pieces), key=lambda each: each[:2])
    names, ordered = tuple(name for _, name, _ in named), tuple(piece for _, _, piece in named)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise StateError(twice[0], "two pieces of the shard would have this name")
    sizes = [piece.nbytes for piece in ordered]
    longest = len(_describe(names, ordered, [MAX_HEADER_NBYTES * 10**6] * len(sizes), sizes)) + 8 + _SLACK_NBYTES
    data_begin = -(-longest // PAGE_NBYTES) * PAGE_NBYTES
    ends = list(itertools.accumulate(sizes, initial=0))
    return Placement(
        pieces=ordered,
        names=names,
        begins=tuple(data_begin + end for end in ends[:-1]),
        data_begin=data_begin,
        tensors_end=data_begin + ends[-1],
        described=_describe(names, ordered, ends[:-1], sizes),
    )


def header(placement: Placement, objects_nbytes: int, metadata: Mapping[str, str]) -> bytes:
    """The file's first ``placement.data_begin`` bytes."""
    origin = placement.data_begin
    objects_begin = placement.tensors_end - origin
    blocks_begin = objects_begin + objects_nbytes
    blocks_end = blocks_begin + table_nbytes(origin + blocks_begin)
    ours: dict[str, Any] = {
        OBJECTS: _entry("U8", (objects_nbytes,), objects_begin, blocks_begin),
        BLOCKS: _entry("U8", (blocks_end - blocks_begin,), blocks_begin, blocks_end),
        "__metadata__": {"format": "pt", "dcpsvc": "1", **metadata},
    }
    comma = b"," if placement.pieces else b""
    text = b"".join((placement.described[:-1], comma, compact(ours)[1:]))
    if len(text) + 8 > origin:
        raise ValueError(f"header of {len(text)} bytes does not fit {origin}")
    return struct.pack("<Q", origin - 8) + text.ljust(origin - 8)


def objects_range(path: str, head: bytes, body_nbytes: int) -> tuple[int, int]:
    """Where the JSON documents lie, from the verified bytes of a header.

    Raises:
        CorruptShardError: The header is not one of ours.
    """
    fields = Fields.parse(path, head[8:], CorruptShardError)
    entry: list[Any] = fields.child(OBJECTS).get("data_offsets", list)
    match entry:
        case [int(begin), int(end)] if 0 <= begin <= end and len(head) + end == body_nbytes:
            return len(head) + begin, len(head) + end
        case _:
            raise fields.fail(f"objects at {entry} do not end where the block table begins")


def header_nbytes(path: str, prefix: bytes, body_nbytes: int) -> int:
    """Length of the header, its 8-byte prefix included.

    Raises:
        CorruptShardError: The length is larger than the file or any safetensors reader allows.
    """
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _PREFIX_NBYTES or length > MAX_HEADER_NBYTES or length + 8 > body_nbytes:
        raise CorruptShardError(path, f"header of {length} bytes in a body of {body_nbytes}")
    return length + 8


def documents(path: str, data: bytes) -> dict[str, Any]:
    """The JSON documents of a shard, by component."""
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise CorruptShardError(path, f"objects are not JSON: {err}") from err
    if not isinstance(parsed, dict):
        raise CorruptShardError(path, "objects are not a JSON object")
    return parsed


def _describe(names: Iterable[str], pieces: Iterable[Piece], begins: Iterable[int], sizes: Iterable[int]) -> bytes:
    return compact(
        {
            name: _entry(piece.dtype, piece.sizes, begin, begin + nbytes)
            for name, piece, begin, nbytes in zip(names, pieces, begins, sizes, strict=True)
        }
    )


def _entry(dtype: str, shape: Shape, begin: int, end: int) -> dict[str, Any]:
    known, parts = FOREIGN.get(dtype, (dtype, ()))
    return {"dtype": known, "shape": [*shape, *parts], "data_offsets": [begin, end]}
