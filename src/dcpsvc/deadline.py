"""A deadline for what has none: calls into a store's client library, or to a disk, which may hang; and the clock."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable


T = TypeVar("T")

_LOOK_S = 0.1


class GivenUpError(Exception):
    """The caller does not want the result any more; the text says why."""


def call(work: Callable[[], T], timeout_s: float, what: str, given_up: Callable[[], str] | None = None) -> T:
    """Run ``work`` on a thread of its own. What it gives or raises comes out here; past the deadline it is left behind.

    Args:
        work: May hang.
        timeout_s: Longest wait for it.
        what: For the error.
        given_up: Asked now and then: why the result is not wanted any more; empty while it is.

    Raises:
        TimeoutError: It did not end in time.
        GivenUpError: ``given_up`` said why.
    """
    done: Future[T] = Future()
    threading.Thread(target=_run_into, args=(work, done), name="dcpsvc-store", daemon=True).start()
    ends = time.monotonic() + timeout_s
    while not wait([done], _patience_s(ends, given_up)).done:
        if given_up is not None and (reason := given_up()):
            raise GivenUpError(reason)
        if time.monotonic() >= ends:
            raise TimeoutError(f"{what} did not end within {timeout_s} s")
    return done.result()


def _patience_s(ends: float, given_up: Callable[[], str] | None) -> float:
    left_s = max(0.0, ends - time.monotonic())
    return left_s if given_up is None else min(left_s, _LOOK_S)


def _run_into(work: Callable[[], T], done: Future[T]) -> None:
    try:
        result = work()
    except Exception as err:  # noqa: BLE001 - it is raised where the future is read
        done.set_exception(err)
    except BaseException as err:  # noqa: BLE001 - a library's own: nobody asked this process to exit here
        done.set_exception(RuntimeError(f"{type(err).__name__}: {err}"))
    else:
        done.set_result(result)


class Clock(Protocol):
    """Time that only moves forward, and work that must end in time."""

    def now(self) -> float:
        """Seconds."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    def bounded(
        self, work: Callable[[], T], timeout_s: float, what: str, given_up: Callable[[], str] | None = None
    ) -> T:
        """See :func:`call`."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def bounded(
        self, work: Callable[[], T], timeout_s: float, what: str, given_up: Callable[[], str] | None = None
    ) -> T:
        """On a thread that is left behind past the deadline."""
        return call(work, timeout_s, what, given_up)
