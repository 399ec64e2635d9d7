"""Parts of a layout: what each rank says of its own shard, and the layout that all of them make.

Of an evenly sharded model thousands of ranks would say the same thousands of lines, but for where in each tensor their
part begins. So a rank's part is cut in two: what it has in common with others, said of a position, by one of them; and
what is its own, with that position.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import LayoutError
from dcpsvc.format import layout
from dcpsvc.format.digest import digest
from dcpsvc.format.grid import Grid, Level, fold
from dcpsvc.format.layout import Chunk, Layout, Run, Tensor
from dcpsvc.format.parse import compact
from dcpsvc.format.tiling import uncovered
from dcpsvc.garbage import uncollected

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dcpsvc.format.shardfile import Piece, Placement


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's, as bytes; equal structure gives equal bytes.

    Attributes:
        common: Aliases, and parts of evenly cut tensors; the same for many ranks.
        own: Everything else, and what ``common`` means on this rank.
    """

    common: bytes
    own: bytes

    @property
    def digest(self) -> str:
        """Of all of it."""
        return digest(self.own)  # that of the rest is in it


def part(placement: Placement, rank: int, aliases: Mapping[str, str]) -> Part:
    """What a rank says of its shard."""
    position: dict[int, int] = {}
    common, own = list[Any](), list[Any]()
    for piece, begin in zip(placement.pieces, placement.begins, strict=True):
        if piece.position is None:
            own.append([piece.key, piece.dtype, piece.shape, piece.offsets, piece.sizes, begin])
        else:
            places = [_place(piece, dim, position) for dim in range(len(piece.shape))]
            rows = [piece.sizes, _within(piece)] if piece.held else []
            common.append([piece.key, piece.dtype, piece.shape, places, piece.held or piece.sizes, begin, *rows])
    shared = compact({"aliases": dict(aliases), "pieces": common})
    return Part(shared, compact({"rank": rank, "position": [*position], "common": digest(shared), "pieces": own}))


def _place(piece: Piece, dim: int, position: dict[int, int]) -> int:
    """Which number of the position says where it begins along a dimension; -1: at its beginning, on every rank."""
    extent = (piece.held or piece.sizes)[dim]
    if extent == piece.shape[dim]:
        return -1
    return position.setdefault(piece.offsets[dim] // extent, len(position))


def _within(piece: Piece) -> list[int]:
    """Where it begins in the part that it is rows of."""
    return [offset % extent for offset, extent in zip(piece.offsets, piece.held, strict=True)]


def speakers(owns: Sequence[bytes]) -> dict[str, int]:
    """Who says what is common: of those with the same, the first. By digest."""
    found: dict[str, int] = {}
    for rank, own in enumerate(owns):
        found.setdefault(json.loads(own)["common"], rank)
    return found


def merge(owns: Iterable[bytes], common: Mapping[str, bytes]) -> Layout:
    """The layout that all parts make together.

    Args:
        owns: Of all ranks.
        common: By digest.

    Raises:
        LayoutError: Together they do not cover every tensor exactly.
    """
    with uncollected():
        found = _Found()
        by_common: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        for data in owns:
            said = json.loads(data)
            by_common[said["common"]].append((said["rank"], *said["position"]))
            found.add_own(said["rank"], said["pieces"])
        for name, members in by_common.items():
            found.add_common(json.loads(common[name]), fold(members))
        made = found.layout()
    for key, tensor in made.tensors.items():
        if reason := uncovered(tensor):
            raise LayoutError(key, reason)
    return made


class _Found:
    """What was heard so far."""

    def __init__(self) -> None:
        self._described: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._chunks: dict[str, list[Chunk]] = defaultdict(list)
        self._runs: dict[str, list[Run]] = defaultdict(list)
        self._aliases: dict[str, str] = {}

    def add_own(self, rank: int, pieces: Iterable[Any]) -> None:
        for key, dtype, shape, offsets, sizes, begin in pieces:
            self._described.setdefault(key, (dtype, tuple(shape)))
            self._chunks[key].append(Chunk(rank, tuple(offsets), tuple(sizes), begin))

    def add_common(self, said: dict[str, Any], members: Sequence[Grid]) -> None:
        """``members``: of those who have it their rank and position."""
        self._aliases |= said["aliases"]
        for key, dtype, shape, places, part, begin, *rows in said["pieces"]:
            self._described.setdefault(key, (dtype, tuple(shape)))
            sizes, within = rows or (part, [0] * len(part))
            self._runs[key] += (Run(tuple(sizes), _at(grid, places, part, within, begin)) for grid in members)

    def layout(self) -> Layout:
        tensors = {
            key: Tensor(dtype, shape, (*self._runs[key], *layout.runs(self._chunks[key])))
            for key, (dtype, shape) in self._described.items()
        }
        return Layout(tensors, self._aliases)


def _at(members: Grid, places: Sequence[int], part: Sequence[int], within: Sequence[int], begin: int) -> Grid:
    """From ranks and positions to ranks, offsets and where they begin in the file."""

    def vector(member: Sequence[int], within: Sequence[int], begin: int) -> tuple[int, ...]:
        along = zip(places, part, within, strict=True)
        offsets = ((0 if at < 0 else member[1 + at] * extent) + rest for at, extent, rest in along)
        return member[0], *offsets, begin

    levels = (Level(count, vector(steps, [0] * len(part), 0)) for count, steps in members.levels)
    return Grid(vector(members.first, within, begin), tuple(levels))
