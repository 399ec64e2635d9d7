"""How often this process has called a store again, because a call failed in a way that may pass."""

from __future__ import annotations

import threading

_lock = threading.Lock()
_count = 0


def count_one() -> None:
    """A call is about to be made again. Any thread."""
    global _count  # noqa: PLW0603 - one number for the process, whichever of its stores it was
    with _lock:
        _count += 1


def retries() -> int:
    """Calls beyond the first ones since the process began, all stores together."""
    return _count
