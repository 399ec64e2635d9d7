"""What saves will cost a given model here, and how often to save. Pure arithmetic on what was measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

_SAFE = 2.0
"""Young's and Daly's formulas hold while a save is short beside twice the time between failures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One small real save, as the slowest rank saw it. Seconds and bytes.

    Attributes:
        shard_nbytes: What each rank wrote.
        ranks: Ranks that took part.
        blocked_s: What training lost.
        local_s: From the call until all shards were durable on their local disks.
        commit_s: From the call to the commit.
        load_s: Reading it back and verifying it.
    """

    shard_nbytes: int
    ranks: int
    blocked_s: float
    local_s: float
    commit_s: float
    load_s: float

    def to_json(self) -> dict[str, Any]:
        """For the other ranks."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What to expect of a model of ``model_nbytes``.

    Attributes:
        model_nbytes: Of a whole checkpoint.
        ranks: That share it.
        mtbf_s: Mean time between failures of the job that is assumed.
        stall_s: What training loses at each save.
        local_s: Until a save survives the death of a process.
        commit_s: Until it survives the death of a node.
        interval_s: Between two saves, for the least work lost.
        lost: Share of the time that is lost then, saving and repeating together.
    """

    model_nbytes: int
    ranks: int
    mtbf_s: float
    stall_s: float
    local_s: float
    commit_s: float
    interval_s: float
    lost: float


def forecast(measured: Measured, model_nbytes: int, mtbf_s: float, ranks: int | None = None) -> Forecast:
    """Scale what was measured to a model. Pessimistic: what a save costs whatever its size is scaled too.

    Args:
        measured: A real save.
        model_nbytes: Of a whole checkpoint: about 14 bytes a parameter with AdamW and bfloat16 weights.
        mtbf_s: Mean time between failures of the whole job.
        ranks: That will share it; default as many as took part.
    """
    count = ranks or measured.ranks
    factor = model_nbytes / count / measured.shard_nbytes
    stall_s, local_s, commit_s, load_s = (
        seconds * factor for seconds in (measured.blocked_s, measured.local_s, measured.commit_s, measured.load_s)
    )
    interval_s = max(best_interval_s(stall_s, mtbf_s), commit_s)  # one save at a time
    return Forecast(
        model_nbytes=model_nbytes,
        ranks=count,
        mtbf_s=mtbf_s,
        stall_s=stall_s,
        local_s=local_s,
        commit_s=commit_s,
        interval_s=interval_s,
        lost=min(1.0, stall_s / interval_s + (interval_s / 2 + commit_s + load_s) / mtbf_s),
    )


def best_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Training time between two saves for which the least work is lost.

    Source: J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006, eq. 37;
    its first term is J. W. Young's, 1974.
    """
    if stall_s >= _SAFE * mtbf_s:
        return mtbf_s
    ratio = math.sqrt(stall_s / (2 * mtbf_s))
    return max(0.0, math.sqrt(2 * stall_s * mtbf_s) * (1 + ratio / 3 + ratio * ratio / 9) - stall_s)
