"""Many ranges of one shard, in the order of the file and in large pieces, each block read once and proven.

What is needed of a shard is a list of segments. They are cut into pieces of whole blocks, since only those can be
proven: blocks that nobody needs are left out, and small neighbours share theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dcpsvc.format.digest import BLOCK_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dcpsvc.storage.shards import VerifiedShard

PIECE_NBYTES = 8 * BLOCK_NBYTES
"""Large enough for disks and object stores; a few of them at once bound the memory a load takes."""


class Segment(NamedTuple):
    """Bytes of the body from ``begin`` on, and where they go."""

    begin: int
    view: memoryview

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.begin + len(self.view)


class Piece(NamedTuple):
    """Whole blocks to read at once, and the segments that have a part in them."""

    begin: int
    end: int
    segments: tuple[Segment, ...]

    def read(self, shard: VerifiedShard, *, direct: bool) -> None:
        """Read, prove, and deliver.

        Args:
            shard: Whose bytes they are.
            direct: Straight to where they go, so that something unproven is there until this returns, and after an
                error. Otherwise only proven bytes get there, by a copy.

        Raises:
            CorruptShardError: See :meth:`VerifiedShard.read`.
            StoreError: Likewise.
        """
        if direct:
            shard.read_into(self.begin, list(self._targets()))
            return
        proven = memoryview(bytearray(self.end - self.begin))
        shard.read_into(self.begin, [proven])
        for begin, view in self._parts():
            view[:] = proven[begin - self.begin : begin - self.begin + len(view)]

    def _parts(self) -> Iterator[tuple[int, memoryview]]:
        for segment in self.segments:
            begin, end = max(segment.begin, self.begin), min(segment.end, self.end)
            yield begin, segment.view[begin - segment.begin : end - segment.begin]

    def _targets(self) -> Iterator[memoryview]:
        """Memory for every byte of the piece: where it goes, or nowhere."""
        at = self.begin
        for begin, view in self._parts():
            if begin > at:
                yield memoryview(bytearray(begin - at))
            yield view
            at = begin + len(view)
        if at < self.end:
            yield memoryview(bytearray(self.end - at))


def pieces(segments: Sequence[Segment], body_nbytes: int) -> Iterator[Piece]:
    """Every segment, in pieces in the order of the file. Of bytes that are needed twice the second comes later."""
    rest = sorted((segment for segment in segments if segment.view), key=lambda segment: segment.begin)
    while rest:
        now, rest = _without_overlap(rest)
        yield from _cut(now, body_nbytes)


def _without_overlap(ordered: list[Segment]) -> tuple[list[Segment], list[Segment]]:
    now: list[Segment] = []
    later: list[Segment] = []
    end = 0
    for segment in ordered:
        if segment.begin < end:
            later.append(segment)
        else:
            now.append(segment)
            end = segment.end
    return now, later


def _cut(ordered: list[Segment], body_nbytes: int) -> Iterator[Piece]:
    first = 0
    for low, high in _runs(ordered):
        for begin in range(low, high, PIECE_NBYTES):
            end = min(begin + PIECE_NBYTES, high)
            while ordered[first].end <= begin:
                first += 1
            last = first
            while last < len(ordered) and ordered[last].begin < end:
                last += 1
            yield Piece(begin, min(end, body_nbytes), tuple(ordered[first:last]))


def _runs(ordered: list[Segment]) -> Iterator[tuple[int, int]]:
    """Ranges of whole blocks that together hold all segments."""
    low = high = -1
    for segment in ordered:
        begin = segment.begin // BLOCK_NBYTES * BLOCK_NBYTES
        end = -(-segment.end // BLOCK_NBYTES) * BLOCK_NBYTES
        if begin > high:
            if high > low:
                yield low, high
            low = begin
        high = max(high, end)
    if high > low:
        yield low, high
