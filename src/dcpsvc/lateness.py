"""Which rank the others waited for, from the seconds that each took for what it does by itself."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

OWN = ("stage", "write", "upload")
"""What a rank does by itself; the other phases are mostly waiting for others."""

_SLOWER, _BY_S = 1.5, 0.1
"""A rank stands out if it took so many times the median, and so much longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowest:
    """The rank that the others waited for.

    Attributes:
        rank: Which.
        phase: Where it lost most, against the median of all.
        seconds: What it took there.
        median_s: What the ranks took there.
    """

    rank: int
    phase: str
    seconds: float
    median_s: float

    @property
    def late_s(self) -> float:
        """How much longer than the median."""
        return self.seconds - self.median_s

    def __str__(self) -> str:
        return f"rank {self.rank} {self.phase} {self.seconds:.1f} s (median {self.median_s:.1f})"


def slowest(took: Mapping[str, Mapping[int, float]]) -> Slowest | None:
    """The rank that stands out, if one does. Pure.

    Args:
        took: By phase and rank, seconds.
    """
    found: Slowest | None = None
    for phase, seconds in took.items():
        if len(seconds) < 2:  # noqa: PLR2004 - one rank waits for nobody
            continue
        rank = max(seconds, key=lambda each: seconds[each])
        median_s = statistics.median_low(seconds.values())
        late = Slowest(rank=rank, phase=phase, seconds=seconds[rank], median_s=median_s)
        if late.seconds > _SLOWER * median_s and late.late_s > max(_BY_S, found.late_s if found else 0.0):
            found = late
    return found
