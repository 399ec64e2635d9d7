"""A shard: one valid ``.safetensors`` file per rank and attempt.

::

    8 bytes   length of the header, little endian
    header    JSON, padded with spaces so that the data begins on a page
    tensors   parts of evenly cut ones, then the others, both in the order of their element size, so each is aligned;
              between the two up to 15 zeros, as the U8 tensor ``__dcpsvc__.padding``
    objects   JSON documents, as the U8 tensor ``__dcpsvc__.objects``
    blocks    16 bytes per MiB of all the above, as the U8 tensor ``__dcpsvc__.blocks``

Offsets in a layout count from the beginning of the file. They depend only on names, dtypes and sizes,
never on a value, so a host buffer can be the image of the file. Of evenly cut tensors they are the same on all ranks
that have as large a part of each, so that a layout says them once.
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
    from collections.abc import Iterable, Mapping, Sequence

    from dcpsvc.format.layout import Shape

OBJECTS = "__dcpsvc__.objects"
BLOCKS = "__dcpsvc__.blocks"
PADDING = "__dcpsvc__.padding"
PAGE_NBYTES = 4096
MAX_HEADER_NBYTES = 100_000_000
"""What every safetensors reader accepts."""

FOREIGN = {
    "C128": ("F64", (2,)),
    "F8_E4M3FNUZ": ("U8", ()), "F8_E5M2FNUZ": ("U8", ()), "F8_E8M0": ("U8", ()),
}  # fmt: skip
"""What not every safetensors reader knows, and as what the header gives it: real and imaginary part, or bytes."""

INNER = "__inner__"
"""Names the JSON document that tells what tensors a rank has stored as those inside them. No component is called so."""

_PREFIX_NBYTES = 8
_ALIGNED_NBYTES = 16
_SLACK_NBYTES = 640
"""Room in the header for what changes between steps: step, attempt, and the sizes of objects and blocks."""

_ROUNDED_BITS = 5
"""A header of many pages is rounded up to a sixteenth of its length, or less."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One chunk this rank writes.

    Attributes:
        key: FQN of the tensor.
        dtype: Its safetensors name.
        shape: Shape of the whole tensor.
        offsets: Where the chunk begins in it.
        sizes: The chunk's extent.
        held: Extent of the part that it is rows of, where several ranks hold that part and each writes some.
    """

    key: str
    dtype: str
    shape: Shape
    offsets: Shape
    sizes: Shape
    held: Shape = ()

    @property
    def name(self) -> str:
        """Name in the file: the FQN for a whole tensor, ``fqn[0:512,0:64]`` for a part of one."""
        if self.sizes == self.shape:
            return self.key
        box = ",".join(f"{o}:{o + s}" for o, s in zip(self.offsets, self.sizes, strict=True))
        return f"{self.key}[{box}]"

    @property
    def longest_name(self) -> str:
        """No other part of the tensor has a longer one."""
        return self.key if self.sizes == self.shape else f"{self.key}[{','.join(f'{e}:{e}' for e in self.shape)}]"

    @property
    def position(self) -> tuple[int, ...] | None:
        """Of a part of an evenly cut tensor: the how manieth it, or that it is rows of, is along each dimension.

        None of any other.
        """
        if self.sizes == self.shape or 0 in self.sizes:
            return None
        found = [divmod(offset, size) for offset, size in zip(self.offsets, self.held or self.sizes, strict=True)]
        return None if any(rest for _, rest in found) and not self.held else tuple(number for number, _ in found)

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
        padding: Zeros between tensors: where they begin, and they.
        described: What the header says about the pieces, as JSON: all that does not change between steps.
    """

    pieces: tuple[Piece, ...]
    names: tuple[str, ...]
    begins: tuple[int, ...]
    data_begin: int
    tensors_end: int
    padding: tuple[int, bytes]
    described: bytes


def place(pieces: Iterable[Piece]) -> Placement:
    """Decide where each piece goes: parts of evenly cut tensors first, widest elements first, then by name."""
    ordered, names = _ordered(pieces)
    evenly = sum(piece.position is not None for piece in ordered)
    sizes = [piece.nbytes for piece in ordered]
    padding_nbytes = -sum(sizes[:evenly]) % _ALIGNED_NBYTES if 0 < evenly < len(sizes) else 0
    room = _header_nbytes(ordered, sizes)
    begins = list(itertools.accumulate(sizes[:evenly], initial=room))
    padding_begin = begins.pop()
    begins += itertools.accumulate(sizes[evenly:], initial=padding_begin + padding_nbytes)
    tensors_end = begins.pop()
    described = _describe(names, ordered, (begin - room for begin in begins), sizes)
    return Placement(
        pieces=ordered,
        names=names,
        begins=tuple(begins),
        data_begin=room,
        tensors_end=tensors_end,
        padding=(padding_begin, bytes(padding_nbytes)),
        described=described,
    )


def _ordered(pieces: Iterable[Piece]) -> tuple[tuple[Piece, ...], tuple[str, ...]]:
    named = [((piece.position is None, -ITEM_NBYTES[piece.dtype], piece.name), piece) for piece in pieces]
    named.sort(key=lambda each: each[0])
    names = tuple(name for (_, _, name), _ in named)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise StateError(twice[0], "two pieces of the shard would have this name")
    return tuple(piece for _, piece in named), names


def _header_nbytes(pieces: Sequence[Piece], sizes: Sequence[int]) -> int:
    """Room for the header: the same for ranks whose parts differ in where they begin, and mostly if in little more."""
    names = (piece.longest_name for piece in pieces)
    far = itertools.repeat(MAX_HEADER_NBYTES * 10**6, len(sizes))
    longest = len(_describe(names, pieces, far, sizes)) + 8 + _SLACK_NBYTES
    unit = PAGE_NBYTES << max(0, (longest // PAGE_NBYTES).bit_length() - _ROUNDED_BITS)
    return -(-longest // unit) * unit


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
    begin, zeros = placement.padding
    if zeros:
        ours[PADDING] = _entry("U8", (len(zeros),), begin - origin, begin - origin + len(zeros))
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


def of_components(documents: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are values of the state: without the records of what is inside tensors."""
    return {name: value for name, value in documents.items() if name.partition("@")[0] != INNER}


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
