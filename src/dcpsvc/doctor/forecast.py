"""What saves will cost a given model here, and how often to save. Pure arithmetic on what was measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

_SAFE = 2.0
"""Young's and Daly's formulas hold while a save is short beside twice the time between failures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Real saves of two sizes, as the slowest rank saw them. Seconds and bytes.

    Attributes:
        shard_nbytes: What each rank wrote: in the larger one, of which the other seconds are.
        ranks: Ranks that took part.
        blocked_s: What training lost.
        local_s: From the call until all shards were durable on their local disks.
        commit_s: From the call to the commit.
        load_s: Reading it back and verifying it.
        smaller: The smaller one, with its ``shard_nbytes``, ``blocked_s``, ``local_s`` and ``commit_s``; empty: none.
    """

    shard_nbytes: int
    ranks: int
    blocked_s: float
    local_s: float
    commit_s: float
    load_s: float
    smaller: dict[str, float] = field(default_factory=dict[str, float])

    def to_json(self) -> dict[str, Any]:
        """For the other ranks."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What to expect of a model of ``model_nbytes``.

    Attributes:
        model_nbytes: Of a whole checkpoint.
        step: The newest commit of the run, whose size that is; None if somebody said the size.
        ranks: That share it.
        mtbf_s: Mean time between failures of the job that is assumed.
        stall_s: What training loses at each save.
        local_s: Until a save survives the death of a process.
        commit_s: Until it survives the death of a node.
        interval_s: Between two saves, for the least work lost.
        lost: Share of the time that is lost then, saving and repeating together.
    """

    model_nbytes: int
    step: int | None = None
    ranks: int
    mtbf_s: float
    stall_s: float
    local_s: float
    commit_s: float
    interval_s: float
    lost: float


def forecast(
    measured: Measured,
    model_nbytes: int,
    mtbf_s: float,
    ranks: int | None = None,
    *,
    copied: bool = True,
    step: int | None = None,
) -> Forecast:
    """Scale what was measured to a model: what a save costs whatever its size, and what each byte adds.

    Args:
        measured: A real save.
        model_nbytes: Of a whole checkpoint: about 14 bytes a parameter with AdamW and bfloat16 weights.
        mtbf_s: Mean time between failures of the whole job.
        ranks: That will share it; default as many as took part.
        copied: Whether memory holds a copy; else training waits until all is written.
        step: See :class:`Forecast`.
    """
    count = ranks or measured.ranks
    nbytes = model_nbytes / count
    stall_s, local_s, commit_s = (scaled(measured, name, nbytes) for name in ("blocked_s", "local_s", "commit_s"))
    if not copied:
        stall_s = max(stall_s, local_s)
    load_s = measured.load_s * nbytes / measured.shard_nbytes
    interval_s = max(best_interval_s(stall_s, mtbf_s), commit_s)  # one save at a time
    return Forecast(
        model_nbytes=model_nbytes,
        step=step,
        ranks=count,
        mtbf_s=mtbf_s,
        stall_s=stall_s,
        local_s=local_s,
        commit_s=commit_s,
        interval_s=interval_s,
        lost=min(1.0, stall_s / interval_s + (interval_s / 2 + commit_s + load_s) / mtbf_s),
    )


def scaled(measured: Measured, name: str, nbytes: float) -> float:
    """Seconds that shards of ``nbytes`` take: a + b * bytes through both sizes.

    A larger save that was no slower than the smaller says nothing about what a byte costs: then the larger one is
    scaled by its bytes alone, which is too much rather than too little.
    """
    large_s, small_s = float(getattr(measured, name)), measured.smaller.get(name, math.inf)
    more_nbytes = measured.shard_nbytes - measured.smaller.get("shard_nbytes", 0.0)
    if large_s <= small_s or more_nbytes <= 0:
        return large_s * nbytes / measured.shard_nbytes
    return max(0.0, large_s + (large_s - small_s) / more_nbytes * (nbytes - measured.shard_nbytes))


def best_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Training time between two saves for which the least work is lost.

    Source: J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006, eq. 37;
    its first term is J. W. Young's, 1974.
    """
    if stall_s >= _SAFE * mtbf_s:
        return mtbf_s
    ratio = math.sqrt(stall_s / (2 * mtbf_s))
    return max(0.0, math.sqrt(2 * stall_s * mtbf_s) * (1 + ratio / 3 + ratio * ratio / 9) - stall_s)
