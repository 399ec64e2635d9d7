"""How hard a process, and its node, work a store: so many transfers at once, so many bytes a second, fewer if asked."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from dcpsvc.errors import StoreThrottledError
from dcpsvc.storage.nodeturns import NodeTurns

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from dcpsvc.config import Limits

_SLOWER = 0.5


class Pace:
    """Turns to transfer data. Any thread.

    Each throttling answer halves the number of turns, once for all that were under way together; each success adds a
    little. So a rank that is turned away backs off as a whole, and finds the rate that the server bears.

    Args:
        limits: Never more than these.
        clock: Seconds that only grow.
        pause: Waits so many seconds, or less if all is over.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        self._limits, self._clock, self._pause = limits, clock, pause
        self._changed = threading.Condition()
        self._turns, self._taken, self._slowed = float(limits.concurrency), 0, 0
        self._free_at = 0.0
        self._node: NodeTurns | None = None
        if limits.node_concurrency and limits.node_folder:
            self._node = NodeTurns(limits.node_folder, limits.node_concurrency, pause=pause)

    @property
    def turns(self) -> int:
        """How many may transfer at once now."""
        return int(self._turns)

    @contextlib.contextmanager
    def turn(self, nbytes: int) -> Generator[None]:
        """One transfer of so many bytes; waits until there is room for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken < int(self._turns))
            self._taken += 1
            slowed, delay_s = self._slowed, self._reserve(nbytes)
        try:
            if delay_s > 0:
                self._pause(delay_s)
            # Last: who waits for anything else holds up no other process.
            with self._node.turn() if self._node else contextlib.nullcontext():
                yield
        except StoreThrottledError:
            self._slow_down(slowed)
            raise
        else:
            self._speed_up()
        finally:
            with self._changed:
                self._taken -= 1
                self._changed.notify_all()

    def _reserve(self, nbytes: int) -> float:
        """Seconds to wait so that the bytes keep to the rate."""
        if not self._limits.nbytes_per_s:
            return 0.0
        now = self._clock()
        begin = max(now, self._free_at)
        self._free_at = begin + nbytes / self._limits.nbytes_per_s
        return begin - now

    def _slow_down(self, slowed: int) -> None:
        with self._changed:
            # What was sent before the last slow-down says nothing about the pace since.
            if slowed == self._slowed:
                self._slowed += 1
                self._turns = max(1.0, self._turns * _SLOWER)

    def _speed_up(self) -> None:
        with self._changed:
            self._turns = min(float(self._limits.concurrency), self._turns + 1.0 / self._turns)
