"""Noticing that a training has diverged, from one number a step. Pure: no clock, no store, no ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from dcpsvc.commits import OWN_METRICS
from dcpsvc.errors import ConfigError
from dcpsvc.policies import is_count, is_name, is_number

if TYPE_CHECKING:
    from collections.abc import Mapping

_WINDOW = 5
_LARGEST = 1e300
"""So that no difference of two values is infinite."""

_NOISE = 3.0
"""A rise within so many times the usual scatter is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """When a training counts as diverged: its metric is NaN or infinite, or has risen and stays up.

    A rise: for ``patience`` steps in a row the mean over about ``fast`` steps lies above that over about ``slow`` steps
    by more than ``rise`` of it, and by more than the scatter explains. Means are taken over the median of the last 5
    values, so one step, however high, or two, changes nothing.

    Rank 0's value counts. It is read at every step: give a number, not a tensor on a device.

    Attributes:
        metric: Name in ``step(..., metrics=)``.
        mode: ``"min"``: smaller is better, a rise is bad. ``"max"``: a fall is.
        rise: Share of the slow mean.
        fast: Steps.
        slow: Steps.
        patience: Steps.
        stop: Ask all ranks to stop: ``step()`` says ``should_stop`` a few steps later.
    """

    metric: str = "loss"
    mode: str = "min"
    rise: float = 0.2
    fast: int = 10
    slow: int = 200
    patience: int = 10
    stop: bool = False

    def __post_init__(self) -> None:
        if not is_name(self.metric):
            raise ConfigError(f"Divergence(metric={self.metric!r}): the metric must be named")
        if self.mode not in {"min", "max"}:
            raise ConfigError(f"Divergence(mode={self.mode!r}): mode must be 'min' or 'max'")
        if not is_number(self.rise) or not 0 < self.rise < math.inf:
            raise ConfigError(f"Divergence(rise={self.rise!r}): rise must be a number above 0")
        for name in ("fast", "slow", "patience"):
            if not is_count(getattr(self, name)):
                raise ConfigError(f"Divergence({name}={getattr(self, name)!r}): {name} must be an int of at least 1")
        if self.fast >= self.slow:
            raise ConfigError(f"Divergence(fast={self.fast}, slow={self.slow}): fast must be below slow")


@dataclass(slots=True)
class Detector:
    """What was seen so far. Its state is a few numbers, which travel with each checkpoint.

    Attributes:
        policy: What counts.
        why: What is wrong now, for people; empty while nothing is.
        since: The step before the first bad one: its weights gave the first bad value. None while nothing is wrong.
    """

    policy: Divergence
    why: str = ""
    since: int | None = None
    _step: int = -1
    _recent: list[float] = field(default_factory=list[float])
    _fast: float = 0.0
    _slow: float = 0.0
    _scatter: float = 0.0
    _bad: int = 0

    def observe(self, step: int, value: float) -> bool:
        """Take one value in; says whether the training has just begun to count as diverged. A step counts once."""
        if step <= self._step:
            return False
        before, was_bad = self._step, bool(self.why)
        self._step = step
        if not math.isfinite(value):
            self._begin(before)
            self.why = f"{self.policy.metric} is {value}"
            return not was_bad
        self._average(value if self.policy.mode == "min" else -value)
        if not self._is_up():
            self._bad, self.why, self.since = 0, "", None
            return False
        self._bad += 1
        self._begin(before)
        if self._bad < self.policy.patience:
            self.why = ""
            return False
        self.why = f"{self.policy.metric} went from about {self._shown(self._slow)} to {self._shown(self._fast)}"
        return not was_bad

    def _begin(self, before: int) -> None:
        if self.since is None:
            self.since = max(before, 0)

    def _average(self, value: float) -> None:
        first = not self._recent
        self._recent = [*self._recent[1 - _WINDOW :], max(-_LARGEST, min(_LARGEST, value))]
        middle = median(self._recent)
        if first:
            self._fast = self._slow = middle
            return
        self._scatter += (abs(middle - self._fast) - self._scatter) * _weight(self.policy.slow)
        self._fast += (middle - self._fast) * _weight(self.policy.fast)
        self._slow += (middle - self._slow) * _weight(self.policy.slow)

    def _is_up(self) -> bool:
        return self._fast - self._slow > max(self.policy.rise * abs(self._slow), _NOISE * self._scatter)

    def _shown(self, value: float) -> str:
        return f"{value if self.policy.mode == 'min' else -value:g}"

    # --- with a checkpoint ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, float]:
        """Everything it knows, as metrics for a manifest."""
        numbers = {
            "step": self._step, "since": -1 if self.since is None else self.since, "bad": self._bad,
            "fast": self._fast, "slow": self._slow, "scatter": self._scatter,
        }  # fmt: skip
        numbers |= {f"recent-{place}": value for place, value in enumerate(self._recent)}
        return {f"{self._prefix}{name}": float(value) for name, value in numbers.items()}

    def restore(self, metrics: Mapping[str, float]) -> None:
        """As it was when that was saved; anew where there is nothing, or of another metric."""
        own = {name: v for name, v in metrics.items() if name.startswith(self._prefix) and abs(v) <= _LARGEST}
        found = {name.removeprefix(self._prefix): v for name, v in own.items()}
        self.why, self._step, since = "", int(found.get("step", -1)), int(found.get("since", -1))
        self.since = since if since >= 0 else None
        self._bad = int(found.get("bad", 0))
        self._fast, self._slow, self._scatter = (found.get(name, 0.0) for name in ("fast", "slow", "scatter"))
        recent = (f"recent-{place}" for place in range(_WINDOW))
        self._recent = [found[name] for name in recent if name in found]

    @property
    def _prefix(self) -> str:
        return f"{OWN_METRICS}divergence.{self.policy.metric}."


def _weight(steps: int) -> float:
    return 2.0 / (steps + 1)
