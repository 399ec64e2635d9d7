"""Calls to the ranks' store in which nobody can hang.

A client of ``TCPStore`` has a timeout and does not keep to it: while the network is cut, or the process that serves
the store is stopped, ``check``, ``compare_set`` and ``get`` sit in ``recv()`` until an answer comes. After a long
cut that may be minutes after the network is back, because TCP doubles its pauses, while a new connection works at
once. So a thread makes the calls, callers wait for it only so long, and a connection that fell silent is replaced.
"""

from __future__ import annotations

import math
import os
import threading
import time
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError, DistNetworkError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._C._distributed_c10d import Store

T = TypeVar("T")

_SILENCE_S = 5.0
"""Longest wait on one connection, before another is made. The server itself may stand still for as long: it looks up
the name of each address that connects, and waits for a name server that does not answer."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
"""Between two tries to connect; each that fails makes torch print a stack trace."""

_LOOK_S = 0.05


class NoAnswerError(RuntimeError):
    """The ranks' store did not answer in time. What it was asked to do may happen all the same, later."""


class Exchange:
    """The store, as long as it answers: whoever calls hears something within ``patience_s``. Any thread.

    A call that got no answer is made again on the next connection. One that was given up may reach the store when the
    network is back, after calls made later. That harms nothing:
    a key bears its attempt, its meeting or its number, and one rank writes it once; a verdict is written by
    compare-and-set, so the first one stands, whoever brings it and however late, and whoever gave up acted on none; a
    heartbeat that comes late is a sign of life; what is deleted late is never written again.

    Args:
        store: Of the job. Only clones of it are used, where it can be cloned.
        patience_s: Longest wait. While a call hangs, others wait no longer than it does, and then fail at once.

    Raises:
        RuntimeError: It cannot be reached.
    """

    def __init__(self, store: Store, patience_s: float) -> None:
        self._patience_s, self._silence_s, self._pid = patience_s, min(patience_s, _SILENCE_S), os.getpid()
        self._lock = threading.Lock()
        self._line: Line | None = Line(partial(own, store, patience_s), self._silence_s)
        self._next: Line | None = None
        self._dial_at, self._pause_s = 0.0, _FIRST_PAUSE_S
        self._silent_since = math.inf
        self._origin = store
        self._origin = self.call(lambda connected: connected, "connect")

    def call(self, work: Callable[[Store], T], what: str) -> T:
        """What ``work``, a short exchange, makes of the store.

        Raises:
            NoAnswerError: No answer.
            RuntimeError: An error for an answer, or nobody is to call here any more.
        """
        began = time.monotonic()
        while True:
            line = self._current()
            try:
                result = line.call(work, what)
            except NoAnswerError:
                self._silent_since = min(self._silent_since, began)
                if line.broken or time.monotonic() >= self._silent_since + self._patience_s:
                    raise
                time.sleep(_LOOK_S)
            else:
                self._silent_since = math.inf
                return result

    def close(self) -> None:
        """End the thread; waits a moment for it. One that hangs ends when the store lets it go."""
        with self._lock:
            lines, self._line, self._next = (self._line, self._next), None, None
        for line in lines:
            if line is not None:
                line.hang_up()
        if lines[0] is not None:
            lines[0].join()

    def _current(self) -> Line:
        if os.getpid() != self._pid:
            raise RuntimeError("a forked child does not talk to the ranks' store")
        with self._lock:
            if self._line is None:
                raise RuntimeError("the connection to the ranks' store is closed")
            if self._line.lost:
                self._replace(self._line)
            elif self._next is not None:  # it came back by itself
                self._next.hang_up()
                self._next, self._pause_s = None, _FIRST_PAUSE_S
            return self._line

    def _replace(self, stuck: Line) -> None:
        """Take the new connection if it stands; see that one is being made. Never waits."""
        fresh, now = self._next, time.monotonic()
        if fresh is not None and not fresh.lost and fresh.store is not None:
            stuck.hang_up()
            self._line, self._next, self._origin, self._pause_s = fresh, None, fresh.store, _FIRST_PAUSE_S
        elif (fresh is None or fresh.broken) and now >= self._dial_at:
            if fresh is not None:
                fresh.hang_up()
            self._next = Line(partial(another, self._origin, self._patience_s), self._silence_s)
            self._dial_at, self._pause_s = now + self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)


def own(store: Store, timeout_s: float) -> Store:
    """A connection of our own to the same store, or the store itself where it knows no other.

    Raises:
        RuntimeError: It cannot be reached; known within about ``timeout_s``, unless what is reached does not answer.
    """
    try:
        return another(store, timeout_s)
    except DistError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError):  # a custom store, which may have no clone()
        return store


def another(store: Store, timeout_s: float) -> Store:
    """A further connection to the same store; see :func:`own`."""
    clone: Store = store.clone()  # type: ignore[attr-defined]
    if isinstance(getattr(clone, "_underlying_non_prefix_store", clone), TCPStore):  # others share it with the job
        clone.set_timeout(timedelta(seconds=timeout_s))  # also of whatever is cloned from this one
    return clone


class Line:
    """One connection, and the thread that owns it. The thread ends once nobody holds the line any more."""

    def __init__(self, dial: Callable[[], Store], patience_s: float) -> None:
        self._patience_s, self._desk = patience_s, _Desk()  # all the thread knows: it must not hold the line itself
        self._thread = threading.Thread(target=self._desk.serve, args=(dial,), name="dcpsvc-ranks-store", daemon=True)
        self._thread.start()

    def __del__(self) -> None:
        self._desk.calls.put(None)

    def hang_up(self) -> None:
        """End the thread when its call ends."""
        self._desk.calls.put(None)

    def join(self) -> None:
        """Wait a moment for the thread to end, unless it hangs."""
        if not self.lost:
            self._thread.join(timeout=1.0)

    @property
    def store(self) -> Store | None:
        """The connection, once it stands."""
        return self._desk.store

    @property
    def broken(self) -> bool:
        """Whether it could not be made, or ended."""
        return bool(self._desk.broken)

    @property
    def lost(self) -> bool:
        """Whether there is no sense in calling. One that was silent for too long may come back."""
        return self.broken or time.monotonic() - self._desk.busy_since >= self._patience_s

    def call(self, work: Callable[[Store], T], what: str) -> T:
        """See :meth:`Exchange.call`. At once in vain while the line is lost."""
        if self.lost:
            raise self._no_answer(what)
        call = _Call(work)
        self._desk.calls.put(call)
        ends = time.monotonic() + self._patience_s
        while not call.answered.acquire(timeout=self._left_s(ends)):
            if self._left_s(ends) <= 0:
                call.wanted = False
                raise self._no_answer(what)
        return call.outcome()

    def _left_s(self, ends: float) -> float:
        """Until the caller's patience ends, or that of the one whose call hangs."""
        return max(0.0, min(ends, self._desk.busy_since + self._patience_s) - time.monotonic())

    def _no_answer(self, what: str) -> NoAnswerError:
        if self.broken:
            return NoAnswerError(f"{what}: no connection to the ranks' store: {self._desk.broken}")
        silent_s = time.monotonic() - self._desk.busy_since
        silent_s = self._patience_s if math.isinf(silent_s) else max(silent_s, self._patience_s)
        return NoAnswerError(f"{what}: the ranks' store has not answered for {silent_s:.1f} s")


class _Call(Generic[T]):
    """What is asked of the thread."""

    def __init__(self, work: Callable[[Store], T]) -> None:
        self.work, self.wanted = work, True
        self.result: T
        self.error: Exception | None = None
        self.answered = threading.Lock()  # of all things to wait for the cheapest
        self.answered.acquire()

    def outcome(self) -> T:
        """What came out. An error takes no reference to this call along, which would keep the line."""
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
        finally:
            del error
        return self.result


class _Desk:
    """The thread's side of a line."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self.store: Store | None = None
        self.broken = ""
        """Why there is no connection; text, because an exception would hold what it passed through."""
        self.busy_since = time.monotonic()
        """When the thread began what it does now: first, to connect. Infinity while nothing is asked."""

    def serve(self, dial: Callable[[], Store]) -> None:
        """The thread: connect, then answer calls in their order."""
        try:
            self.store = dial()
        except Exception as err:  # noqa: BLE001 - whatever it is, callers hear of it
            self.broken = str(err) or type(err).__name__
        self.busy_since = math.inf
        while (call := self.calls.get()) is not None:
            if call.wanted:
                self._answer(call)
            call.answered.release()

    def _answer(self, call: _Call[Any]) -> None:
        self.busy_since = time.monotonic()
        try:
            call.result = call.work(self._connected())
        except DistNetworkError as err:
            self.broken = str(err)
            call.error = err.with_traceback(None)
        except Exception as err:  # noqa: BLE001 - raised where the answer is waited for
            call.error = err.with_traceback(None)
        self.busy_since = math.inf

    def _connected(self) -> Store:
        if self.store is None or self.broken:
            raise NoAnswerError(f"no connection to the ranks' store: {self.broken}")
        return self.store
