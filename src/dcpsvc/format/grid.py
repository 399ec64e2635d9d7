"""Many numbers that follow a rule, written as the rule: what thousands of ranks have in common.

A grid is a vector of numbers and some levels of steps. Along a level each number grows by its step. So the chunks of a
tensor that is sharded evenly over 4,096 ranks are one grid, and over a mesh of two dimensions one of two levels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Vector = tuple[int, ...]


class Level(NamedTuple):
    """So many times, and by how much each number grows from one time to the next."""

    number: int
    steps: Vector


class Grid(NamedTuple):
    """Vectors of one length.

    Attributes:
        first: The first of them.
        levels: The fastest first.
    """

    first: Vector
    levels: tuple[Level, ...] = ()

    @property
    def number(self) -> int:
        """How many vectors."""
        return math.prod(level.number for level in self.levels)

    def bounds(self) -> tuple[Vector, Vector]:
        """Of each number the smallest and the largest."""
        low, high = list(self.first), list(self.first)
        for count, steps in self.levels:
            for at, step in enumerate(steps):
                low[at] += min(step, 0) * (count - 1)
                high[at] += max(step, 0) * (count - 1)
        return tuple(low), tuple(high)

    def vectors(self) -> Iterator[Vector]:
        """All of them, in order."""
        if not self.levels:
            yield self.first
            return
        *inner, (count, steps) = self.levels
        for times in range(count):
            yield from Grid(moved(self.first, steps, times), tuple(inner)).vectors()

    def between(self, low: Sequence[int], high: Sequence[int]) -> Iterator[Vector]:
        """Those of which each number lies in ``[low, high]``, found without looking at many others."""
        if not self.levels:
            if all(least <= value <= most for least, value, most in zip(low, self.first, high, strict=True)):
                yield self.first
            return
        *others, (count, steps) = self.levels
        inner = Grid(self.first, tuple(others))
        least, most = inner.bounds()
        begin, end = 0, count
        for at, step in enumerate(steps):
            if step > 0:
                begin = max(begin, -((most[at] - low[at]) // step))
                end = min(end, (high[at] - least[at]) // step + 1)
            elif step < 0:
                begin = max(begin, -((high[at] - least[at]) // -step))
                end = min(end, (most[at] - low[at]) // -step + 1)
            elif most[at] < low[at] or least[at] > high[at]:
                return
        for times in range(begin, end):
            yield from inner._replace(first=moved(self.first, steps, times)).between(low, high)


def moved(vector: Vector, steps: Vector, times: int) -> Vector:
    """So many steps on."""
    return tuple(value + step * times for value, step in zip(vector, steps, strict=True))


def fold(vectors: Iterable[Vector]) -> list[Grid]:
    """As few grids as a greedy look finds; together they give the vectors in their order."""
    grids = [Grid(vector) for vector in vectors]
    while len(folded := _folded(grids)) < len(grids):
        grids = folded
    return grids


def _folded(grids: list[Grid]) -> list[Grid]:
    """With one more level where several of one form follow one another in equal steps."""
    found: list[Grid] = []
    at = 0
    while at < len(grids):
        first, last, steps = grids[at], at, None
        while last + 1 < len(grids) and grids[last + 1].levels == first.levels:
            step = _difference(grids[last].first, grids[last + 1].first)
            if steps not in {None, step}:
                break
            steps, last = step, last + 1
        found.append(first if steps is None else Grid(first.first, (*first.levels, Level(last - at + 1, steps))))
        at = last + 1
    return found


def _difference(before: Vector, after: Vector) -> Vector:
    return tuple(b - a for a, b in zip(before, after, strict=True))
