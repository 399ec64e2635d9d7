"""A deadline for what has none: calls into a store's client library, which may hang."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def call(work: Callable[[], None], timeout_s: float, what: str) -> None:
    """Run ``work`` on a thread of its own. What it raises is raised here; past the deadline it is left behind.

    Raises:
        TimeoutError: It did not end in time.
    """
    done: Future[None] = Future()
    threading.Thread(target=_run_into, args=(work, done), name="dcpsvc-store", daemon=True).start()
    if not wait([done], timeout_s).done:
        raise TimeoutError(f"{what} did not end within {timeout_s} s")
    done.result()


def _run_into(work: Callable[[], None], done: Future[None]) -> None:
    try:
        work()
    except BaseException as err:  # noqa: BLE001 - it is raised where the future is read
        done.set_exception(err)
    else:
        done.set_result(None)
