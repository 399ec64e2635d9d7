"""A deadline for what has none: calls into a store's client library, which may hang."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable


T = TypeVar("T")


def call(work: Callable[[], T], timeout_s: float, what: str) -> T:
    """Run ``work`` on a thread of its own. What it gives or raises comes out here; past the deadline it is left behind.

    Raises:
        TimeoutError: It did not end in time.
    """
    done: Future[T] = Future()
    threading.Thread(target=_run_into, args=(work, done), name="dcpsvc-store", daemon=True).start()
    if not wait([done], timeout_s).done:
        raise TimeoutError(f"{what} did not end within {timeout_s} s")
    return done.result()


def _run_into(work: Callable[[], T], done: Future[T]) -> None:
    try:
        result = work()
    except BaseException as err:  # noqa: BLE001 - it is raised where the future is read
        done.set_exception(err)
    else:
        done.set_result(result)
