"""Many ranges of one shard, in the order of the file and in large pieces, each block read once and proven.

What is needed of a shard is a list of ranges with the memory they go to. They are cut into pieces of whole blocks,
since only those can be proven: blocks that nobody needs are left out, and small neighbours share theirs.
"""

from __future__ import annotations

import bisect
import itertools
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dcpsvc.format.digest import BLOCK_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from dcpsvc.storage.shards import VerifiedShard

Range = tuple[int, int]

PIECE_NBYTES = 8 * BLOCK_NBYTES
"""Large enough for disks and object stores; a few of them at once bound the memory a load takes."""


class Sink(Protocol):
    """A range of a shard's body, and where it goes."""

    @property
    def begin(self) -> int:
        """The first byte."""
        ...

    @property
    def end(self) -> int:
        """The first byte after it."""
        ...

    @property
    def view(self) -> memoryview:
        """Memory for the whole range. Any thread."""
        ...

    def filled(self, nbytes: int) -> None:
        """So many bytes more are in ``view``, and proven. Any thread."""
        ...


class Segment(NamedTuple):
    """Bytes of the body from ``begin`` on that go to memory as they are."""

    begin: int
    view: memoryview

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.begin + len(self.view)

    def filled(self, nbytes: int) -> None:
        """Nothing more to do."""


class Part(NamedTuple):
    """What a piece has of a sink, from ``begin`` of the body on."""

    begin: int
    end: int
    sink: Sink

    @property
    def view(self) -> memoryview:
        """Where it goes."""
        return self.sink.view[self.begin - self.sink.begin : self.end - self.sink.begin]


class Piece(NamedTuple):
    """Whole blocks to read at once, and what they are needed for."""

    begin: int
    end: int
    parts: tuple[Part, ...]

    def read(self, shard: VerifiedShard, *, direct: bool, once: bool = False) -> None:
        """Read, prove, and deliver.

        Args:
            shard: Whose bytes they are.
            direct: Straight to where they go, so that something unproven is there until this returns, and after an
                error. Otherwise, and where bytes are needed twice, only proven bytes get there, by a copy.
            once: Nobody on this machine is going to read them again soon.

        Raises:
            CorruptShardError: See :meth:`VerifiedShard.read`.
            StoreError: Likewise.
        """
        if direct and not self._overlap():
            shard.read_into(self.begin, list(self._targets()), once=once)
            for part in self.parts:
                part.sink.filled(part.end - part.begin)
            return
        proven = memoryview(bytearray(self.end - self.begin))
        shard.read_into(self.begin, [proven], once=once)
        deliver(self.parts, self.begin, proven)

    def _overlap(self) -> bool:
        return any(after.begin < before.end for before, after in itertools.pairwise(self.parts))

    def _targets(self) -> Iterator[memoryview]:
        """Memory for every byte of the piece: where it goes, or nowhere."""
        at = self.begin
        for part in self.parts:
            if part.begin > at:
                yield memoryview(bytearray(part.begin - at))
            yield part.view
            at = part.end
        if at < self.end:
            yield memoryview(bytearray(self.end - at))


def deliver(parts: Iterable[Part], begin: int, proven: memoryview) -> None:
    """Copy bytes of the body, from ``begin`` on, to where they go."""
    for part in parts:
        part.view[:] = proven[part.begin - begin : part.end - begin]
        part.sink.filled(part.end - part.begin)


class Needs:
    """All that is needed of one shard.

    Args:
        sinks: In any order; they may overlap.
        body_nbytes: Of the shard.
    """

    def __init__(self, sinks: Iterable[Sink], body_nbytes: int) -> None:
        self._body_nbytes = body_nbytes
        self._layers: list[list[Sink]] = []
        rest = sorted((sink for sink in sinks if sink.end > sink.begin), key=lambda sink: sink.begin)
        while rest:
            now, rest = _without_overlap(rest)
            self._layers.append(now)
        self._ends = [[sink.end for sink in layer] for layer in self._layers]

    def nbytes(self, within: Sequence[Range] | None = None) -> int:
        """Bytes of all pieces."""
        return sum(high - low for low, high in _common(self.runs(), within))

    def pieces(self, within: Sequence[Range] | None = None) -> Iterator[Piece]:
        """Everything, in pieces in the order of the file.

        Args:
            within: Only of these ranges of whole blocks, ascending; None: of all.
        """
        for low, high in _common(self.runs(), within):
            for begin in range(low, high, PIECE_NBYTES):
                end = min(begin + PIECE_NBYTES, high)
                yield Piece(begin, end, tuple(self.parts(begin, end)))

    def parts(self, begin: int, end: int) -> Iterator[Part]:
        """What a range is needed for; those that overlap come last."""
        for number in range(len(self._layers)):
            yield from self._parts(number, begin, end)

    def runs(self) -> list[Range]:
        """Ranges of whole blocks that hold everything; neighbours joined, none twice."""
        joined: list[Range] = []
        for low, high in sorted(run for layer in self._layers for run in _runs(layer)):
            if joined and low <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
            else:
                joined.append((low, high))
        return [(low, min(high, self._body_nbytes)) for low, high in joined]

    def _parts(self, number: int, begin: int, end: int) -> Iterator[Part]:
        layer = self._layers[number]
        for at in range(bisect.bisect_right(self._ends[number], begin), len(layer)):
            if layer[at].begin >= end:
                return
            yield Part(max(layer[at].begin, begin), min(layer[at].end, end), layer[at])


def _without_overlap(ordered: list[Sink]) -> tuple[list[Sink], list[Sink]]:
    now: list[Sink] = []
    later: list[Sink] = []
    end = 0
    for sink in ordered:
        if sink.begin < end:
            later.append(sink)
        else:
            now.append(sink)
            end = sink.end
    return now, later


def _common(runs: Iterable[Range], within: Sequence[Range] | None) -> Iterator[Range]:
    if within is None:
        yield from runs
        return
    ends = [high for _, high in within]
    for low, high in runs:
        for at in range(bisect.bisect_right(ends, low), len(within)):
            if within[at][0] >= high:
                break
            yield max(low, within[at][0]), min(high, within[at][1])


def _runs(ordered: Iterable[Sink]) -> Iterator[Range]:
    """Ranges of whole blocks that together hold all sinks."""
    low = high = -1
    for sink in ordered:
        begin = sink.begin // BLOCK_NBYTES * BLOCK_NBYTES
        end = -(-sink.end // BLOCK_NBYTES) * BLOCK_NBYTES
        if begin > high:
            if high > low:
                yield low, high
            low = begin
        high = max(high, end)
    if high > low:
        yield low, high
