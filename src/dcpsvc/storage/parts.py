"""Where one part of a large file ends and the next begins. Pure, so that another process cuts the same way."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

MAX_PARTS = 10_000
MIN_PART_NBYTES = 5 * 2**20
"""Of all parts but the last; S3's law."""

_PAGE_NBYTES = 2**20


class How(Enum):
    """How a part got to the server."""

    SENT = "sent"
    COPIED = "copied from an earlier object"
    FOUND = "found in an upload that was cut short"


class Span(NamedTuple):
    """The bytes of one part.

    Attributes:
        number: From 1 on.
        begin: First byte.
        end: After the last one.
        unchanged: An earlier object has the same.
    """

    number: int
    begin: int
    end: int
    unchanged: bool = False


class Part(NamedTuple):
    """One part as the server has it."""

    number: int
    nbytes: int
    etag: str
    checksum: str


def cut(nbytes: int, part_nbytes: int, runs: Sequence[tuple[int, int]] = ()) -> list[Span]:
    """The parts of a file.

    Args:
        nbytes: Of the file.
        part_nbytes: Of a part, where possible; more if there would be too many of them.
        runs: Ranges that are unchanged, in whole MiB; what is too short to be a part counts as changed.
    """
    part_nbytes = max(part_nbytes, -(-nbytes // MAX_PARTS // _PAGE_NBYTES) * _PAGE_NBYTES)
    bounds: list[tuple[int, int, bool]] = []
    at = 0
    for begin, end in _fitting(runs):
        bounds += [(*piece, False) for piece in _even(at, begin, part_nbytes)]
        bounds += [(*piece, True) for piece in _even(begin, end, part_nbytes)]
        at = end
    bounds += [(begin, min(begin + part_nbytes, nbytes), False) for begin in range(at, nbytes, part_nbytes)]
    if len(bounds) > MAX_PARTS:
        return cut(nbytes, part_nbytes)
    return [Span(number, *bound) for number, bound in enumerate(bounds or [(0, 0, False)], 1)]


def _fitting(runs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Shortened so that what is between two of them is long enough to be a part, as is each of them."""
    at = 0
    for begin, end in runs:
        first = begin if begin == at else max(begin, at + MIN_PART_NBYTES)
        if end - first >= MIN_PART_NBYTES:
            yield first, end
            at = end


def _even(begin: int, end: int, part_nbytes: int) -> Iterator[tuple[int, int]]:
    """Pieces of about the same size, in whole MiB, each long enough to be a part; none of nothing."""
    count = min(-(-(end - begin) // part_nbytes), (end - begin) // MIN_PART_NBYTES)
    pages = (end - begin) // _PAGE_NBYTES
    for number in range(count):
        yield begin + number * pages // count * _PAGE_NBYTES, begin + (number + 1) * pages // count * _PAGE_NBYTES


class Work:
    """The parts that are still to be carried. Several threads take from it; after a failure nobody gets another.

    Args:
        spans: All of them.
        arrived: Called with the number of bytes of each that is there.

    Attributes:
        count: How many there are in all.
        largest_nbytes: Of the largest one.
        nbytes: Of those that are there, by how they got there.
    """

    def __init__(self, spans: Sequence[Span], arrived: Callable[[int], None] | None) -> None:
        self.count, self.largest_nbytes = len(spans), max(span.end - span.begin for span in spans)
        self.nbytes: Counter[How] = Counter()
        self._spans, self._arrived = iter(spans), arrived
        self._parts: list[Part] = []
        self._failed, self._lock = False, threading.Lock()

    def __iter__(self) -> Iterator[Span]:
        while True:
            with self._lock:
                span = None if self._failed else next(self._spans, None)
            if span is None:
                return
            yield span

    @property
    def parts(self) -> list[Part]:
        """What is there."""
        return sorted(self._parts)

    @property
    def is_done(self) -> bool:
        """Whether all of it is there."""
        return len(self._parts) == self.count

    def done(self, part: Part, how: How) -> None:
        """It is there."""
        with self._lock:
            self._parts.append(part)
            self.nbytes[how] += part.nbytes
            if self._arrived:
                self._arrived(part.nbytes)

    @contextlib.contextmanager
    def failing(self) -> Generator[None]:
        """An error inside ends the work of all."""
        try:
            yield
        except BaseException:  # an interrupt too: the other threads must not go on alone
            self._failed = True
            raise
