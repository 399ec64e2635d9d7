"""Whether a server copies a part in less time than it takes to send it: what the last ones took."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from dcpsvc.storage.parts import MIN_PART_NBYTES, How

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

KNOWN = 8
"""So many parts that went one way, the last ones, say what it takes; fewer say nothing."""

ANEW = 16
"""Where copying is slower, one part in so many is copied all the same: the link or the server may have changed."""


class Rates:
    """What parts took to get to one server, by how they went, and which way is the faster one now. Any thread.

    What a part waits for counts, too: others that are under way, and a link or a server that is slow.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._took = {how: deque[float](maxlen=KNOWN) for how in (How.SENT, How.COPIED)}
        self._passed_over = 0

    @contextlib.contextmanager
    def timed(self, how: How, nbytes: int) -> Generator[None]:
        """A part goes that way; one that does not get there, or is so small that it only waits, says nothing."""
        began = self._clock()
        yield
        if nbytes >= MIN_PART_NBYTES:
            with self._lock:
                self._took[how].append((self._clock() - began) / nbytes)

    def copies(self) -> bool:
        """Whether the next part that the server could copy is to be copied, and not sent."""
        with self._lock:
            if not self._copying_is_slower():
                return True
            self._passed_over += 1
            return self._passed_over % ANEW == 0

    def _copying_is_slower(self) -> bool:
        sent, copied = self._took.values()
        return min(len(sent), len(copied)) == KNOWN and statistics.median(copied) > statistics.median(sent)
