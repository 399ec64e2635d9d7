"""The life-cycle of a checkpoint as events: one observer, one logger, one line per event for the whole job.

The names double as the labelled points of a checkpoint's life: crash tests kill at each of them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("dcpsvc")


class Point(StrEnum):
    """Labelled points, in the order of life; and one that has no place in it."""

    OPENED = "opened"
    RECOVERED = "recovered"
    RESUMED = "resumed"
    SAVE_ACCEPTED = "save-accepted"
    STAGED = "staged"
    PLAN_AGREED = "plan-agreed"
    SHARD_WRITTEN = "shard-written"
    ACKED_LOCAL = "acked-local"
    UPLOADED = "uploaded"
    ACKED_REMOTE = "acked-remote"
    MANIFEST_CREATED = "manifest-created"
    COMMITTED = "committed"
    RETAINED = "retained"
    SAVE_SKIPPED = "save-skipped"
    SAVE_FAILED = "save-failed"
    CLOSED = "closed"
    TRAINING_WAITED = "training-waited"
    """How long the training thread waited, once it is over, and for what: ``room`` among saves under way, this ``save``
    inside ``save()``, or the copy before an ``optimizer`` steps. The sum of all is ``blocked_s`` of ``statistics()``.
    No point of the life of a checkpoint, for the uploader has the save by then and may be anywhere."""


_INFO = {Point.OPENED, Point.RECOVERED, Point.RESUMED, Point.COMMITTED, Point.CLOSED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened on one rank.

    Attributes:
        name: A :class:`Point`.
        rank: Global rank it happened on.
        step: Training step, where there is one.
        attempt: Which try to save that step.
        phase: Stage of the life a failure happened in; of ``training-waited``, what for.
        nbytes: Bytes of this rank, or of the checkpoint for ``committed``.
        seconds: How long what just ended took.
        detail: For people.
    """

    name: Point
    rank: int
    step: int | None = None
    attempt: str = ""
    phase: str = ""
    nbytes: int | None = None
    seconds: float | None = None
    detail: str = ""

    def __str__(self) -> str:
        parts = [f"event={self.name}", f"rank={self.rank}"]
        for name in ("step", "attempt", "phase", "nbytes"):
            value = getattr(self, name)
            if value not in {None, ""}:
                parts.append(f"{name}={value}")
        if self.seconds is not None:
            parts.append(f"seconds={self.seconds:.3f}")
        if self.detail:
            parts.append(self.detail)
        return " ".join(parts)


class Events:
    """Tells the observer everything, and the log one line per event for the whole job.

    The coordinator logs what concerns the job; a failing rank logs its own failure, with its number.
    """

    def __init__(self, *, rank: int, observer: Callable[[Event], None] | None) -> None:
        self._rank, self._observer = rank, observer

    def emit(
        self,
        name: Point,
        *,
        step: int | None = None,
        attempt: str = "",
        phase: str = "",
        nbytes: int | None = None,
        seconds: float | None = None,
        detail: str = "",
        level: int | None = None,
    ) -> None:
        """Report an event of this rank. Never raises; any thread.

        Args:
            name: What happened.
            step: Training step.
            attempt: Which try.
            phase: Stage a failure happened in.
            nbytes: Bytes concerned.
            seconds: Duration.
            detail: For people.
            level: Log level; default INFO for what concerns the job, on the coordinator only, else DEBUG.
        """
        event = Event(
            name=name, rank=self._rank, step=step, attempt=attempt, phase=phase,
            nbytes=nbytes, seconds=seconds, detail=detail,
        )  # fmt: skip
        if level is None:
            level = logging.INFO if name in _INFO and self._rank == 0 else logging.DEBUG
        logger.log(level, "%s", event)
        if self._observer is not None:
            try:
                self._observer(event)
            except (Exception, SystemExit):  # an observer is a stranger's code and must not break a save
                logger.exception("on_event raised at %s", name)
