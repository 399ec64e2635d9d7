"""Signals that ask a process to end: taken, remembered, and given back."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from dcpsvc.deadline import Clock

logger = logging.getLogger("dcpsvc")

AGAIN_S = 2.0
"""A SIGTERM this long after the first one means it. Sooner it is the same one: where a cluster signals every process
of a job and a launcher hands its own on, two arrive together."""

_ANSWER_S = 1.0
"""How long the main thread may take to hear a second SIGTERM."""

_standing: list[StopSignals] = []
_mask = threading.local()


class StopSignals:
    """Takes signals that ask a process to end, and only remembers them.

    A handler that was there is called as well. A second SIGTERM, :data:`AGAIN_S` after the first, acts as if this were
    not here; so does every signal in a forked child, because a data loader ends its workers by SIGTERM.

    Python runs handlers between two bytecodes of the main thread, so not while that is inside one long call, such as
    a collective. Where nobody else uses the wakeup descriptor of :mod:`signal`, :meth:`look` sees a signal even then.

    Attributes:
        first: The signal that came first, and when; None if none did.
    """

    def __init__(self, names: Sequence[str], clock: Clock) -> None:
        self._numbers = [_number(name) for name in names]
        self._clock, self._pid = clock, os.getpid()
        self._before: dict[int, Any] = {}
        self._wakeup = _Wakeup()
        self._term_s = self._seen_term_s = self._answered_s = -math.inf
        self._looked_s = -math.inf
        self._unanswered: tuple[float, float] | None = None
        self.first: tuple[signal.Signals, float] | None = None

    @property
    def taken(self) -> set[int]:
        """Those that were taken."""
        return set(self._before)

    def install(self) -> None:
        """From now on. Only the main thread can; elsewhere this is said once, and nothing is watched."""
        for number in self._numbers:
            if signal.getsignal(number) is None:
                logger.warning("%s is not watched: a library handles it outside Python", number.name)
                continue
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread of the main interpreter
                names = " and ".join(number.name for number in self._numbers)
                logger.warning("%s cannot be watched: the Checkpointer was not made on the main thread", names)
                return
        if self._before:
            _standing.append(self)
            self._wakeup.open()

    def give_back(self) -> None:
        """Put back what was there, where ours still stands. Off the main thread our handlers stay, and step aside."""
        if self not in _standing:
            return
        _standing.remove(self)
        with contextlib.suppress(ValueError):
            for number, handler in self._before.items():
                if self._stands(number):
                    signal.signal(number, handler)
            self._wakeup.close()

    def look(self) -> None:
        """See what the main thread has had no time to hear. One thread at a time."""
        if self not in _standing or os.getpid() != self._pid:
            return
        now = self._clock.now()
        for number in self._wakeup.read():
            if number in self._before and self._stands(number):
                self._note(signal.Signals(number), now)
                if number == signal.SIGTERM:
                    self._see_term(now)
        self._looked_s = now
        self._end_if_nobody_answers(now)

    def _see_term(self, now: float) -> None:
        if self._seen_term_s == -math.inf:
            self._seen_term_s = now
        elif now - self._seen_term_s >= AGAIN_S and self._unanswered is None:
            self._unanswered = self._looked_s, now

    def _end_if_nobody_answers(self, now: float) -> None:
        """A second SIGTERM, and the main thread is inside a call that may never return: only it could step aside."""
        if self._unanswered is None:
            return
        came_s, seen_s = self._unanswered
        if self._answered_s >= came_s or callable(self._before[signal.SIGTERM]):
            self._unanswered = None
        elif now - seen_s >= _ANSWER_S:
            logger.error("SIGTERM came again and the main thread does not answer: ending by SIGKILL")
            os.kill(self._pid, signal.SIGKILL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """On the main thread, in the middle of anything: no lock, no log."""
        now = self._clock.now()
        if self not in _standing or os.getpid() != self._pid or self._is_again(number, now):
            self._step_aside(number, frame)
            return
        self._note(signal.Signals(number), now)
        if callable(handler := self._before.get(number)):
            handler(number, frame)

    def _is_again(self, number: int, now: float) -> bool:
        if number != signal.SIGTERM:
            return False
        self._answered_s = now
        if self._term_s == -math.inf:
            self._term_s = now
        return now - self._term_s >= AGAIN_S

    def _note(self, number: signal.Signals, now: float) -> None:
        if self.first is None:
            self.first = number, now

    def _step_aside(self, number: int, frame: FrameType | None) -> None:
        handler = self._before.get(number, signal.SIG_DFL)
        if self._stands(number):
            signal.signal(number, handler)
            signal.raise_signal(number)
        elif callable(handler):  # somebody took the signal after us, and calls us
            handler(number, frame)

    def _stands(self, number: int) -> bool:
        return signal.getsignal(number) == self._handle


class _Wakeup:
    """The pipe into which the interpreter writes the number of a signal at once; there is one for a process."""

    def __init__(self) -> None:
        self._pipe: tuple[int, int] | None = None

    def open(self) -> None:
        pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        if (taken := signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)) == -1:
            self._pipe = pipe
            return
        signal.set_wakeup_fd(taken)  # asyncio's, or another Checkpointer's
        for end in pipe:
            os.close(end)

    def read(self) -> bytes:
        if self._pipe is None:
            return b""
        try:
            return os.read(self._pipe[0], 4096)
        except OSError:  # empty; or closed at this moment
            return b""

    def close(self) -> None:
        if self._pipe is None:
            return
        if (standing := signal.set_wakeup_fd(-1)) not in {-1, self._pipe[1]}:
            signal.set_wakeup_fd(standing)
        pipe, self._pipe = self._pipe, None
        for end in pipe:
            os.close(end)


def _number(name: str) -> signal.Signals:
    number = signal.Signals.__members__.get(name)
    if number is None or number in {signal.SIGKILL, signal.SIGSTOP}:
        raise ConfigError(f"stop_signals: {name!r} is not a signal that a process can take")
    return number


# --- forks ----------------------------------------------------------------------------------------
# A child is born with our handlers and our pipe. Until both are gone it must not hear a signal: its handler would
# swallow it, and a byte in the pipe would tell the parent of a signal that was not for it.


def _before_fork() -> None:
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, {number for each in _standing for number in each.taken})


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _after_fork_in_child() -> None:
    for signals in reversed(_standing[:]):
        signals.give_back()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
