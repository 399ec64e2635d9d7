"""A committed checkpoint as policies see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping
    from datetime import datetime

DIVERGED = "diverged"
"""Metric that tags a checkpoint: recorded by a divergence detector, or by hand."""

OWN_METRICS = "dcpsvc."
"""How the names of metrics begin that this package keeps for itself; no listing shows them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What a policy may know about a committed checkpoint.

    Attributes:
        step: Training step.
        key: Its identity: step and attempt.
        created: When the ranks agreed to save it; None where nothing tells.
        metrics: Numbers recorded with it, or later.
        pins: Why somebody wants it to stay, whatever the policy; empty if nobody does.
        needs: Other checkpoints whose files it names.
    """

    step: int
    key: Hashable
    created: datetime | None = None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    pins: tuple[str, ...] = ()
    needs: frozenset[Hashable] = frozenset()

    @property
    def diverged(self) -> bool:
        """Whether it was tagged: no rule but :class:`Everything` keeps it, and no resume takes it unasked."""
        return is_diverged(self.metrics)


def listed_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without what a divergence detector keeps for itself, which is of no use to people."""
    return {name: value for name, value in metrics.items() if not name.startswith(OWN_METRICS)}


def is_diverged(metrics: Mapping[str, float]) -> bool:
    """Whether the metric ``diverged`` is there and not 0."""
    return metrics.get(DIVERGED, 0.0) != 0.0
