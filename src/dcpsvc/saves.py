"""Accepting saves, on the training thread: admitted or left out, staged, and handed to the uploader."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from dcpsvc.errors import ConfigError, SaveSkippedError, StepExistsError
from dcpsvc.events import Point
from dcpsvc.format.keys import MAX_STEP

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcpsvc.admission import Admission
    from dcpsvc.catalog import Catalog
    from dcpsvc.events import Events
    from dcpsvc.laststep import LastStep
    from dcpsvc.pending import PendingSave
    from dcpsvc.policies import Every
    from dcpsvc.save import Save
    from dcpsvc.saving import Saver
    from dcpsvc.state.collected import Collected
    from dcpsvc.uploader import Uploader


def check_step(step: object) -> None:
    """Refuse what is no step.

    Raises:
        ConfigError: No int, or not in the range that names of files have room for.
    """
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MAX_STEP:
        raise ConfigError(f"step={step!r} must be an int in 0..{MAX_STEP}")


class Saves:
    """Where every save of a job begins.

    Attributes:
        skipped: Saves that back-pressure left out.
        last: The last one that was begun.
        last_began: When that was, on the monotonic clock.
    """

    def __init__(
        self,
        admission: Admission,
        saver: Saver,
        uploader: Uploader,
        last_step: LastStep,
        *,
        catalog: Catalog,
        events: Events,
    ) -> None:
        self._admission, self._saver, self._uploader = admission, saver, uploader
        self._catalog, self._events, self._last_step = catalog, events, last_step
        self.skipped, self._blocked_s = 0, 0.0
        self.last: PendingSave | None = None
        self.last_began = time.monotonic()

    @property
    def blocked_s(self) -> float:
        """Training time that all saves together took."""
        return self._blocked_s + self._saver.held_s

    def is_overdue(self, every: Every | None) -> bool:
        """Whether the schedule by the clock wants a save now. Any thread."""
        seconds = None if every is None else every.seconds
        return seconds is not None and time.monotonic() - self.last_began >= seconds

    def check_new(self, step: int) -> None:
        """A committed step is never saved again.

        Raises:
            StepExistsError: It is committed, or may be.
        """
        if (committed := self._catalog.taken(step)) is not None:
            raise StepExistsError(step, committed.attempt, self._catalog.newest)

    def begin(
        self,
        step: int,
        metrics: Mapping[str, float],
        *,
        values: Collected | None = None,
        must: bool = False,
        left_s: float | None = None,
    ) -> PendingSave:
        """Snapshot the state, or leave the save out. When this returns the optimizers may step.

        Args:
            step: Training step.
            metrics: For the manifest.
            values: Kept from an earlier moment; None takes those of now.
            must: Never left out.
            left_s: Time until the process must have ended, if it must.

        Raises:
            StateError: Something cannot be saved, by key.
            StepExistsError: The step is committed.
            WaitTimeoutError: No room within ``left_s``.
        """
        began = time.perf_counter()
        left_out = self._admission.admit(step, must=must, left_s=left_s)
        waited_s = time.perf_counter() - began
        self.check_new(step)  # after the wait: the save before may have been of this very step
        save = self._saver.accept(step, began)
        if left_out:
            return self._leave_out(save.pending, left_out)
        self.last, self.last_began = save.pending, time.monotonic()
        metrics = {**self._last_step.take(save.pending), **metrics}
        timings = save.pending.timings
        try:
            try:
                self._saver.stage(save, metrics, values)
            finally:
                timings.blocked_s, timings.waited_s = save.elapsed_s(), waited_s
                self._uploader.accept(save)
            self._saver.settle(save)
        except BaseException:  # the user's Ctrl-C, wherever it comes
            self._saver.let_go(save)
            raise
        timings.blocked_s = save.elapsed_s()
        self._blocked_s += timings.blocked_s
        self._tell_blocked(save)
        if save.pending.state != "skipped":
            self._last_step.save_begun(step)
        return save.pending

    def _tell_blocked(self, save: Save) -> None:
        timings = save.pending.timings
        for what, seconds in (("room", timings.waited_s), ("save", timings.blocked_s - timings.waited_s)):
            self._events.emit(
                Point.TRAINING_WAITED, step=save.key.step, attempt=save.key.attempt, phase=what, seconds=seconds
            )

    def _leave_out(self, pending: PendingSave, reason: str) -> PendingSave:
        self.skipped += 1
        error = SaveSkippedError(pending.step, pending.attempt, self._catalog.newest, reason)
        self._events.emit(
            Point.SAVE_SKIPPED, step=pending.step, attempt=pending.attempt, detail=str(error), level=logging.INFO
        )
        pending.resolve(pending.committed, error)
        return pending
