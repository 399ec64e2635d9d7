"""The end of a job: everything committed, or as much as the time that is left allows."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc.errors import FencedError, WaitTimeoutError
from dcpsvc.events import Point
from dcpsvc.ranks.rendezvous import DisagreementError, Meeting

if TYPE_CHECKING:
    from dcpsvc.annotating import Annotator
    from dcpsvc.announcing import Announcer
    from dcpsvc.catalog import Catalog
    from dcpsvc.config import Options
    from dcpsvc.events import Events
    from dcpsvc.laststep import LastStep
    from dcpsvc.ranks.job import Job
    from dcpsvc.saves import Saves
    from dcpsvc.saving import Saver
    from dcpsvc.steering import Steering
    from dcpsvc.uploader import Uploader

_LOOK_S = 0.2

_GOODBYE_S = 1.0
"""At least so long the peers are waited for at the end, however long notes beside checkpoints took."""


@dataclass(slots=True, kw_only=True)
class Ending:
    """Saves the last step, waits for what is under way, and ends the threads. Training thread."""

    job: Job
    options: Options
    events: Events
    catalog: Catalog
    uploader: Uploader
    saver: Saver
    saves: Saves
    last: LastStep
    steering: Steering
    announcer: Announcer
    annotator: Annotator

    def finish(self, timeout_s: float | None, *, failed: bool) -> None:
        """Until everything is committed, the last step too.

        Args:
            timeout_s: Longest wait.
            failed: The loop ended in the middle of a step.

        Raises:
            WaitTimeoutError: ``timeout_s`` has passed. Where a preemption set the limit that is only said.
        """
        limit_s = 0.0 if self.steering.aborted else timeout_s
        ends = None if limit_s is None else time.monotonic() + limit_s
        try:
            self._wait_until(ends)
            self._save_last(failed=failed)
            self._wait_until(ends)
        except WaitTimeoutError as err:
            if self.steering.left_s() is None and not self.steering.aborted:
                raise
            self.announcer.cut_short(err.pending, self.catalog.newest_local)

    def leave(self) -> None:
        """Say goodbye so that nobody's store disappears under a peer; then stop every thread."""
        self.last.end()
        self.uploader.abandon()
        left_s, longest_s = self.steering.left_s(), self.options.sync_timeout_s
        patience_s = longest_s if left_s is None else min(longest_s, left_s + 2.0)
        ends = time.monotonic() + patience_s
        self.annotator.close(patience_s)
        patience_s = max(_GOODBYE_S, ends - time.monotonic())
        with contextlib.suppress(DisagreementError, RuntimeError):  # a peer that is gone cannot be waited for
            self.job.meet("close", None, lambda _: None, Meeting(patience_s, patience_s))
            self.job.linger("close", patience_s)
        self.uploader.stop()
        self.saver.close()
        self.steering.stop()

    def _save_last(self, *, failed: bool) -> None:
        """Save the last complete step, if the model still is what it was then."""
        step = self.last.unsaved
        if not self.options.save_last or step is None or isinstance(self.uploader.last_error, FencedError):
            return
        if reason := self.last.obstacle(in_a_step=failed):
            detail = f"the last step is not saved: {reason}"
            self.events.emit(Point.SAVE_FAILED, step=step, detail=detail, level=logging.WARNING)
            return
        self.saves.begin(step, self.last.metrics, values=self.last.values, must=True, left_s=self.steering.left_s())

    def _wait_until(self, ends: float | None) -> None:
        """Until nothing is under way. A preemption may come meanwhile: its grace counts from then on."""
        while True:
            left = [left_s for left_s in (_left_s(ends), self.steering.left_s()) if left_s is not None]
            try:
                return self.uploader.wait(min([*left, _LOOK_S]))
            except WaitTimeoutError:
                if left and min(left) <= 0:
                    self.steering.end_early()
                    raise


def _left_s(ends: float | None) -> float | None:
    return None if ends is None else max(0.0, ends - time.monotonic())
