"""Closing at the end of the interpreter what nobody closed."""

from __future__ import annotations

import atexit
import threading
import weakref
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Closes(Protocol):
    """What must be closed."""

    def close_at_exit(self) -> None:
        """Close, and raise nothing."""
        ...


def at_exit(thing: Closes) -> None:
    """Close it at the end of the interpreter, while its threads still work; it may go before.

    A plain atexit hook comes too late to begin a save: thread pools have been told to end by then.
    """
    reference = weakref.ref(thing)

    def close() -> None:
        if (alive := reference()) is not None:
            alive.close_at_exit()

    register: Callable[[Callable[[], None]], object] = getattr(threading, "_register_atexit", atexit.register)
    register(close)
