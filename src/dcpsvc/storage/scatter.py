"""Many ranges of one shard, in the order of the file and in large pieces, each block read once and proven.

What is needed of a shard is a list of ranges with the memory they go to. They are cut into pieces of whole blocks,
since only those can be proven: blocks that nobody needs are left out, and small neighbours share theirs.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dcpsvc.format.digest import BLOCK_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from dcpsvc.storage.shards import VerifiedShard

Range = tuple[int, int]

_own = threading.local()

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
    def view(self) -> memoryview | None:
        """Memory for the whole range; None: it takes proven bytes only. Any thread."""
        ...

    def filled(self, nbytes: int) -> None:
        """So many bytes more are in ``view``, and proven. Any thread."""
        ...

    def put(self, begin: int, proven: memoryview) -> None:
        """Take bytes of the body from ``begin`` on; nothing of ``proven`` is looked at after that. Any thread."""
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

    def put(self, begin: int, proven: memoryview) -> None:
        """By a copy."""
        self.view[begin - self.begin : begin - self.begin + len(proven)] = proven


class Part(NamedTuple):
    """What a piece has of a sink, from ``begin`` of the body on."""

    begin: int
    end: int
    sink: Sink

    @property
    def view(self) -> memoryview | None:
        """Memory where it goes."""
        whole = self.sink.view
        return None if whole is None else whole[self.begin - self.sink.begin : self.end - self.sink.begin]


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
                error. Otherwise, and where bytes are needed twice or go to no memory, only proven bytes get there.
            once: Nobody on this machine is going to read them again soon.

        Raises:
            CorruptShardError: See :meth:`VerifiedShard.read`.
            StoreError: Likewise.
        """
        targets = self._targets() if direct and not self._overlap() else None
        if targets is None:
            proven = _scratch(self.end - self.begin)
            shard.read_into(self.begin, [proven], once=once)
            deliver(self.parts, self.begin, proven)
            return
        shard.read_into(self.begin, targets, once=once)
        for part in self.parts:
            part.sink.filled(part.end - part.begin)

    def _overlap(self) -> bool:
        return any(after.begin < before.end for before, after in itertools.pairwise(self.parts))

    def _targets(self) -> list[memoryview] | None:
        """Memory for every byte of the piece: where it goes, or nowhere; None where a part has none."""
        found: list[memoryview] = []
        at = self.begin
        for part in self.parts:
            if (view := part.view) is None:
                return None
            if part.begin > at:
                found.append(memoryview(bytearray(part.begin - at)))
            found.append(view)
            at = part.end
        return [*found, memoryview(bytearray(self.end - at))] if at < self.end else found


def deliver(parts: Iterable[Part], begin: int, proven: memoryview) -> None:
    """Copy bytes of the body, from ``begin`` on, to where they go."""
    for part in parts:
        part.sink.put(part.begin, proven[part.begin - begin : part.end - begin])


class Needs:
    """All that is needed of one shard.

    Args:
        sinks: In any order; they may overlap.
        body_nbytes: Of the shard.
    """

    def __init__(self, sinks: Iterable[Sink], body_nbytes: int) -> None:
        self.body_nbytes = body_nbytes
        self._layers: list[list[Sink]] = []
        rest = sorted((sink for sink in sinks if sink.end > sink.begin), key=lambda sink: sink.begin)
        while rest:
            now, rest = _without_overlap(rest)
            self._layers.append(now)
        self._ends = [[sink.end for sink in layer] for layer in self._layers]

    def nbytes(self, within: Sequence[Range] | None = None) -> int:
        """Bytes of all pieces."""
        return sum(high - low for low, high in _common(self.runs(), within))

    @property
    def in_place(self) -> bool:
        """Every byte goes to one place in memory that is there already, but for a few between them."""
        sinks = self.sinks()
        between = self.nbytes() - sum(sink.end - sink.begin for sink in sinks)
        return len(self._layers) <= 1 and between <= PIECE_NBYTES and all(isinstance(sink, Segment) for sink in sinks)

    def pieces(self, within: Sequence[Range] | None = None, nbytes: int = PIECE_NBYTES) -> Iterator[Piece]:
        """Everything, in pieces in the order of the file.

        Args:
            within: Only of these ranges of whole blocks, ascending; None: of all.
            nbytes: Of the largest piece, whole blocks.
        """
        for low, high in _common(self.runs(), within):
            for begin in range(low, high, nbytes):
                end = min(begin + nbytes, high)
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
        return [(low, min(high, self.body_nbytes)) for low, high in joined]

    def sinks(self) -> list[Sink]:
        """All that was given, but for empty ones."""
        return [sink for layer in self._layers for sink in layer]

    def _parts(self, number: int, begin: int, end: int) -> Iterator[Part]:
        layer = self._layers[number]
        for at in range(bisect.bisect_right(self._ends[number], begin), len(layer)):
            if layer[at].begin >= end:
                return
            yield Part(max(layer[at].begin, begin), min(layer[at].end, end), layer[at])


def _scratch(nbytes: int) -> memoryview:
    """Memory of this thread, already touched after the first use. Void when it asks again."""
    found: memoryview | None = getattr(_own, "scratch", None)
    if found is None or len(found) < nbytes:
        found = _own.scratch = memoryview(bytearray(max(nbytes, PIECE_NBYTES)))
    return found[:nbytes]


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
