"""What a job says about its checkpoints: the schedule at the start, the summary at the end. Once for all ranks."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from dcpsvc.events import Point
from dcpsvc.policies import Best
from dcpsvc.preflight import mebibytes

if TYPE_CHECKING:
    from dcpsvc.catalog import Catalog
    from dcpsvc.config import Options
    from dcpsvc.events import Events
    from dcpsvc.pending import Statistics
    from dcpsvc.preflight import Size
    from dcpsvc.ranks.job import Job
    from dcpsvc.resuming import Resumed
    from dcpsvc.settling import OpenRun

logger = logging.getLogger("dcpsvc")

_CAUSE_LENGTH = 240


class Announcer:
    """Speaks on the coordinator; the observers of the other ranks hear it too."""

    def __init__(self, job: Job, run: OpenRun, options: Options, events: Events, catalog: Catalog) -> None:
        self._job, self._run, self._options, self._events, self._catalog = job, run, options, events, catalog
        self._began = time.monotonic()

    def opened(self, newest: int | None, predicted: Size | None) -> None:
        """Destination, schedule and size, before the first step."""
        size = "unknown" if predicted is None else mebibytes(predicted.shard_nbytes)
        detail = (
            f"root={self._run.remote.url} local={self._run.local_path} run_id={self._run.run_id} "
            f"world_size={self._job.world_size} epoch={self._run.settled.epoch.number} newest={newest} "
            f"size_per_rank={size} saves: {self._schedule()}"
        )
        self._events.emit(Point.OPENED, detail=detail)
        for attempt in self._run.settled.recovered:
            detail = "the upload that was cut short is finished"
            self._events.emit(Point.RECOVERED, step=attempt.step, attempt=attempt.attempt, detail=detail)

    def resumed(self, found: Resumed | None) -> None:
        """What was loaded, and when the next save is due; warns where none ever will be."""
        if found is None:
            detail = f"fresh start: nothing is committed at {self._run.remote.url}; {self._next_save(0)}"
            self._events.emit(Point.RESUMED, step=0, detail=detail)
            self.check_schedule(0)
            return
        rejected = f"; not used: {'; '.join(found.rejected)}" if found.rejected else ""
        detail = f"{found.summary}; {self._next_save(found.attempt.step)}{rejected}"
        self._events.emit(Point.RESUMED, step=found.attempt.step, attempt=found.attempt.attempt, detail=detail)
        self.check_schedule(found.attempt.step)

    def went_behind(self, step: int, newer: list[int]) -> None:
        """A step was resumed by name, and there are newer commits."""
        if newer and self._job.coordinates:
            logger.warning(
                "resumed from step %s by name; newer commits stay, and these steps cannot be saved again here: %s. "
                "To train on from step %s for good, use another run root.",
                step, newer, step,
            )  # fmt: skip

    def differs(self, step: int, changes: list[str]) -> None:
        """What is not as it was when the checkpoint that was resumed was made, a sentence each."""
        if self._job.coordinates:
            for change in changes:
                logger.warning("resumed step %s: %s", step, change)

    def check_schedule(self, start: int) -> None:
        """Warn about a run that is too short for its schedule."""
        every, total = self._options.every, self._options.total_steps
        if total is None or every is None or every.steps is None or every.seconds is not None:
            return
        if self._job.coordinates and start < total < _next(start, every.steps):
            logger.warning(
                "no save is due before the end: %s steps from step %s, every=%s; %s", total - start, start, every.steps,
                "only the last step is saved" if self._options.save_last else "nothing will be saved (save_last=False)",
            )  # fmt: skip

    def cut_short(self, pending: tuple[str, ...], newest_local: int | None) -> None:
        """The time to stop has run out while saves were under way."""
        logger.log(
            logging.WARNING if self._job.coordinates else logging.DEBUG,
            "stopped while %s was under way; newest step on all local disks: %s, which the next start there commits",
            ", ".join(pending), newest_local,
        )  # fmt: skip

    def closed(self, statistics: Statistics, why: str, steps: int | None) -> None:
        """The summary: what there is, what it cost, how to go on."""
        elapsed_s = max(time.monotonic() - self._began, 1e-9)
        share = 100 * statistics.blocked_s / elapsed_s
        parts = [
            f"{statistics.committed} committed, {statistics.failed} failed, {statistics.skipped} skipped",
            f"blocked {statistics.blocked_s:.2f} s ({share:.2f} % of {elapsed_s:.0f} s)",
            *(f"failed: {' '.join(cause.split())[:_CAUSE_LENGTH]}" for cause in statistics.failures),
            *self._best(),
            self._how_to_go_on(statistics.newest),
        ]
        every = self._options.every
        if steps is not None and every is not None and every.steps is not None and steps < every.steps:
            parts.append(f"no scheduled save was due: the run came to step {steps}, every={every.steps}")
        if why:
            parts.append(f"stopped by {why}")
        self._events.emit(Point.CLOSED, step=statistics.newest, detail="; ".join(parts))

    def _best(self) -> list[str]:
        """What each rule by a metric puts first, from what is known already: nothing is read."""
        there = {*self._catalog.attempts.values()}  # a retention that broke off may have left what is deleted
        commits = [commit for commit in self._catalog.with_late_metrics() if commit.key in there]
        rules = [rule for rule in self._options.keep.parts() if isinstance(rule, Best)]
        steps = {commit.key: commit.step for commit in commits}
        return [f"step {steps[key]} is {why}" for rule in rules for key, why in rule.reasons(commits).items()]

    def _how_to_go_on(self, newest: int | None) -> str:
        if newest is None:
            return "nothing is committed"
        return (
            f"start the same command again to resume from step {newest} (dcpsvc show {self._run.remote.url} {newest})"
        )

    def _schedule(self) -> str:
        return "only on save() and at the end" if self._options.every is None else repr(self._options.every)

    def _next_save(self, start: int) -> str:
        every = self._options.every
        if every is None:
            return "no schedule"
        due = [f"at step {_next(start, every.steps)}"] if every.steps is not None else []
        due += [f"in {every.seconds:g} s"] if every.seconds is not None else []
        return f"next save {' or '.join(due)}"

    def next_due(self, step: int) -> str:
        """When the next save is due, for people."""
        return self._next_save(step)


def _next(start: int, steps: int) -> int:
    return (start // steps + 1) * steps
