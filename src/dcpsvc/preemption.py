"""Being told to end soon: by a signal, by a trigger file, or by another rank; and how much time that leaves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dcpsvc.deadline import SystemClock
from dcpsvc.ranks.proposals import STOP
from dcpsvc.stopsignals import StopSignals

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from dcpsvc.deadline import Clock

EXIT_STOPPED = 75
"""Exit code of a job that was stopped before its end: EX_TEMPFAIL of sysexits.h, "try again later"."""

_TRIGGER_POLL_S = 1.0
"""A trigger file may be on a file system that all ranks of a large job share."""


class TriggerFile:
    """A file whose touching asks the job to end. One that is there from an earlier time asks nothing; none is deleted.

    Args:
        path: Need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._known = False
        self._before: int | None = None
        self.touched()

    def touched(self) -> bool:
        """Whether it was made or touched since this object was made. False where nobody can tell."""
        try:
            now = self.path.stat().st_mtime_ns
        except FileNotFoundError:
            self._known = True
            return False
        except OSError:  # a file system in trouble is not a reason to stop
            return False
        if not self._known:
            self._known, self._before = True, now
        return now != self._before


class Preemption:
    """Whether this process was told to end, why, and how much time it has.

    Args:
        signals: Names of those to take; none switches them off.
        trigger: See :class:`TriggerFile`.
        grace_s: From being told to the end.
        rank: To say on which rank it was.
        clock: For the grace.
    """

    def __init__(
        self,
        signals: Sequence[str] = ("SIGTERM", "SIGUSR1"),
        trigger: str | os.PathLike[str] | None = None,
        grace_s: float = 25.0,
        *,
        rank: int = 0,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._signals = StopSignals(signals, self._clock)
        self._trigger = None if trigger is None else TriggerFile(trigger)
        self._grace_s, self._rank = grace_s, rank
        self._look_s = -_TRIGGER_POLL_S
        self._touched_s: float | None = None
        self._noticed: tuple[str, float] | None = None

    def install(self) -> None:
        """Take the signals. Main thread."""
        self._signals.install()

    def uninstall(self) -> None:
        """Leave the signals alone. Main thread; elsewhere our handlers stay, and hand on what comes."""
        self._signals.give_back()

    def wanted(self) -> str | None:
        """``stop``, once this process was told to end. For the watcher, at every look."""
        self._signals.look()
        self._look_at_trigger()
        return STOP if self._told else None

    def noticed(self, why: str = "another rank was told to end") -> None:
        """The ranks agreed to end soon; where this one had not been told, its time counts from here."""
        if self._noticed is None:
            self._noticed = why, self._clock.now()

    @property
    def requested(self) -> str:
        """Why: ``SIGTERM on rank 2``, ``trigger file /run/stop``, or what was noticed; empty if nobody asked."""
        told = self._told or self._noticed
        return told[0] if told else ""

    @property
    def deadline(self) -> float | None:
        """When the grace ends, by the clock; None if nobody asked."""
        since = [told[1] for told in (self._told, self._noticed) if told]
        return min(since) + self._grace_s if since else None

    def left_s(self) -> float | None:
        """Seconds of grace that remain, at least 0; None if nobody asked. Any thread."""
        ends = self.deadline
        return None if ends is None else max(0.0, ends - self._clock.now())

    @property
    def _told(self) -> tuple[str, float] | None:
        if (first := self._signals.first) is not None:
            return f"{first[0].name} on rank {self._rank}", first[1]
        if self._trigger is not None and self._touched_s is not None:
            return f"trigger file {self._trigger.path}", self._touched_s
        return None

    def _look_at_trigger(self) -> None:
        now = self._clock.now()
        if self._trigger is None or self._touched_s is not None or now - self._look_s < _TRIGGER_POLL_S:
            return
        self._look_s = now
        if self._trigger.touched():
            self._touched_s = now
