"""The layout: FQN -> chunks -> place in a shard. Static while the structure of the state is the same.

Chunks that follow one another by a rule are kept as that rule, on disk and in memory: a model of 5,000 tensors on
4,096 ranks has 20 million of them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from dcpsvc.errors import LayoutError
from dcpsvc.format.digest import digest
from dcpsvc.format.grid import Grid, Level, fold
from dcpsvc.format.manifest import FORMAT, MAX_RANKS, MAX_SHARD_NBYTES
from dcpsvc.format.parse import Fields, compact
from dcpsvc.format.tiling import MAX_CHUNKS, uncovered
from dcpsvc.garbage import uncollected

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

MAX_NBYTES = 4 << 30
MAX_DIMS = 64
_MAX_LEVELS = 32
_LEAST_COUNT = 2

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
class Run:
    """Chunks of one size.

    Attributes:
        sizes: Their extent, per dimension.
        grid: Of each its rank, its offsets, and where it begins: ``(rank, *offsets, begin)``.
    """

    sizes: Shape
    grid: Grid

    @property
    def numel(self) -> int:
        """Elements in all of them."""
        return math.prod(self.sizes) * self.grid.number

    def is_whole(self, shape: Shape) -> bool:
        """Whether it is one chunk, all of a tensor."""
        return self.sizes == shape and not self.grid.levels and not any(self.grid.first[1:-1])

    def to_json(self) -> list[Any]:
        """As it stands in the layout: one chunk, and the steps to the others."""
        first, sizes, levels = self.grid.first, self.sizes, self.grid.levels
        chunk = [first[0], first[1:-1], sizes, first[-1]]
        return [*chunk, [[n, steps[0], steps[1:-1], steps[-1]] for n, steps in levels]] if levels else chunk


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the state, cut into chunks that cover it exactly."""

    dtype: str
    shape: Shape
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, dtype: str, shape: Shape, chunks: Iterable[Chunk]) -> Self:
        """From its chunks; the order stays."""
        return cls(dtype, shape, tuple(runs(chunks)))

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Made at each call: where ranks are many, :meth:`overlapping` is much faster."""
        return tuple(_chunk(run.sizes, vector) for run in self.runs for vector in run.grid.vectors())

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * ITEM_NBYTES[self.dtype]

    def overlapping(self, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[Chunk]:
        """The chunks that hold some element of a box; of all others no more is looked at than the rule."""
        high = [offset + size - 1 for offset, size in zip(offsets, sizes, strict=True)]
        for run in self.runs:
            if 0 in run.sizes:
                continue
            low = [offset - size + 1 for offset, size in zip(offsets, run.sizes, strict=True)]
            for vector in run.grid.between([0, *low, 0], [MAX_RANKS, *high, MAX_SHARD_NBYTES]):
                yield _chunk(run.sizes, vector)


def runs(chunks: Iterable[Chunk]) -> Iterator[Run]:
    """The same chunks in the same order."""
    for sizes, group in itertools.groupby(chunks, key=lambda chunk: chunk.sizes):
        for grid in fold((chunk.rank, *chunk.offsets, chunk.begin) for chunk in group):
            yield Run(sizes, grid)


def _chunk(sizes: Shape, vector: tuple[int, ...]) -> Chunk:
    return Chunk(vector[0], vector[1:-1], sizes, vector[-1])


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

    def ends(self) -> dict[int, tuple[int, str]]:
        """How far the tensors reach in the file of each rank that has any, and which of them reaches so far."""
        by_rule: dict[Grid, tuple[int, str]] = {}
        for key, tensor in self.tensors.items():
            for run in tensor.runs:
                end = run.grid.first[-1] + math.prod(run.sizes) * ITEM_NBYTES[tensor.dtype]
                rule = _ranks(run.grid)
                by_rule[rule] = max((end, key), by_rule.get(rule, (0, "")))
        ends: dict[int, tuple[int, str]] = {}
        for rule, (end, key) in by_rule.items():  # few: what one mesh has cut has one
            for rank, farther in rule.vectors():
                ends[rank] = max((end + farther, key), ends.get(rank, (0, "")))
        return ends

    def dumps(self) -> bytes:
        """The file's content; equal layouts give equal bytes."""
        with uncollected():
            tensors = {
                key: [t.dtype, t.shape, [run.to_json() for run in t.runs]] for key, t in sorted(self.tensors.items())
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


def _ranks(grid: Grid) -> Grid:
    """Only whose chunks they are, and how much farther in the file than the first."""
    return Grid((grid.first[0], 0), tuple(Level(count, (steps[0], steps[-1])) for count, steps in grid.levels))


def _tensor(fields: Fields, key: str, value: Any) -> Tensor:
    try:
        dtype, shape, found = value
        tensor = Tensor(dtype, _shape(shape), tuple(_run(*run) for run in found))
        if dtype not in ITEM_NBYTES:
            raise fields.fail(f"{key}: unknown dtype {dtype!r}")
        reason = uncovered(tensor)
    except (TypeError, ValueError) as err:
        raise fields.fail(f"{key}: {err}") from err
    if reason:
        raise fields.fail(f"{key}: {reason}")
    return tensor


def _run(rank: Any, offsets: Any, sizes: Any, begin: Any, levels: Any = ()) -> Run:
    """Every number of every chunk is in its bounds, and there are not too many to be looked at."""
    first = (_count(rank, MAX_RANKS), *_shape(offsets), _count(begin, MAX_SHARD_NBYTES))
    if len(offsets) != len(sizes):
        raise ValueError(f"a box at {offsets!r:.80} of size {sizes!r:.80}")
    if len(levels) > _MAX_LEVELS:
        raise ValueError(f"{len(levels)} levels of steps")
    grid = Grid(first, tuple(_level(len(first), *level) for level in levels))
    if grid.number > MAX_CHUNKS:
        raise ValueError(f"{grid.number} chunks in a run, at most {MAX_CHUNKS} are read")
    low, high = grid.bounds()
    if min(low) < 0 or high[0] > MAX_RANKS or high[-1] > MAX_SHARD_NBYTES:
        raise ValueError(f"a run from {first[0]} on leaves what there can be")
    return Run(_shape(sizes), grid)


def _level(length: int, count: Any, rank: Any, offsets: Any, begin: Any) -> Level:
    steps = (rank, *offsets, begin)
    if len(steps) != length or any(type(step) is not int or abs(step) > MAX_SHARD_NBYTES for step in steps):
        raise ValueError(f"not steps: {steps!r:.80}")
    if _count(count, MAX_CHUNKS) < _LEAST_COUNT:
        raise ValueError(f"a level of {count}")
    return Level(count, steps)


def _shape(value: Any) -> Shape:
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        raise ValueError(f"not a shape: {value!r:.80}")
    return tuple(_count(extent, MAX_SHARD_NBYTES) for extent in value)


def _count(value: Any, maximum: int) -> int:
    if type(value) is not int or not 0 <= value <= maximum:
        raise ValueError(f"not a count: {value!r:.80}")
    return value
