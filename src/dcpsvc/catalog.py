"""What a rank knows to be committed at the run root, from the moment the run was opened."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from dcpsvc.commits import Commit
    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.manifest import Manifest


@dataclass(slots=True)
class Catalog:
    """What this rank knows to be committed. Decided by the ranks together, so the same everywhere.

    Attributes:
        attempts: The attempt that committed each step.
        in_use: Checkpoints that retention must not touch, and why.
        aside: Commits that neither count for retention nor are deleted by it: damaged, or newer than the one that was
            resumed by name.
        unknown: Attempts that may or may not be committed, by step.
        leftovers: Attempts of this job that failed; what is left of them goes with the next commit.
        newest_local: Newest step whose shards are all durable on the ranks' local tiers.
        slowest: The rank that the newest commit of this job waited for, for people; empty if none stood out.
        manifests: Coordinator: valid commits, ascending; read at the first retention.
        commits: Coordinator: what the newest retention has left, with all metrics that it found.
        late: Coordinator: metrics that this job has recorded since.
    """

    attempts: dict[int, Attempt] = field(default_factory=dict)
    in_use: dict[Hashable, str] = field(default_factory=dict)
    aside: set[Attempt] = field(default_factory=set)
    unknown: dict[int, Attempt] = field(default_factory=dict)
    leftovers: set[Attempt] = field(default_factory=set)
    newest_local: int | None = None
    slowest: str = ""
    manifests: list[Manifest] | None = None
    commits: tuple[Commit, ...] = ()
    late: dict[Hashable, dict[str, float]] = field(default_factory=dict["Hashable", dict[str, float]])

    @property
    def newest(self) -> int | None:
        """The newest committed step."""
        return max(self.attempts, default=None)

    def record(self, attempt: Attempt, metrics: Mapping[str, float]) -> None:
        """Metrics of a commit, which are durable beside it. Any thread."""
        self.late[attempt] = {**self.late.get(attempt, {}), **metrics}

    def with_late_metrics(self) -> list[Commit]:
        """What is committed, with every metric that is known here."""
        return [replace(one, metrics={**one.metrics, **self.late.get(one.key, {})}) for one in self.commits]

    def taken(self, step: int) -> Attempt | None:
        """The attempt that committed a step, or may have."""
        return self.attempts.get(step) or self.unknown.get(step)

    def add(self, found: Manifest) -> None:
        """A commit of this job."""
        self.attempts[found.step] = found.key
        if self.manifests is not None:
            self.manifests = sorted([*self.manifests, found], key=lambda one: (one.step, one.key.epoch, one.attempt))

    def set_aside(self, resumed: int, *, damaged: bool) -> list[int]:
        """Commits newer than the one resumed neither count for retention nor are deleted by it; says their steps.

        Args:
            resumed: Step that was resumed.
            damaged: Resume fell back from them, so their steps may be saved anew. Else the user went behind them.
        """
        newer = {step: attempt for step, attempt in self.attempts.items() if step > resumed}
        self.aside |= set(newer.values())
        self.manifests = None
        if damaged:
            for step in newer:
                del self.attempts[step]
        return sorted(newer)

    def hold(self, attempt: Attempt) -> None:
        """It is being resumed from: retention must not touch it while this job lives."""
        self.in_use[attempt] = "resumed from"

    def drop(self, attempt: Attempt) -> None:
        """It was deleted."""
        if self.attempts.get(attempt.step) == attempt:
            del self.attempts[attempt.step]
        if self.manifests is not None:
            self.manifests = [manifest for manifest in self.manifests if manifest.key != attempt]
