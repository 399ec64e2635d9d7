"""The uploader: one background thread that takes saves to their commit, one after the other."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from dcpsvc.errors import FencedError, WaitTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.errors import SaveError
    from dcpsvc.life import Life
    from dcpsvc.save import Save


class Uploader:
    """The thread and its counters.

    Attributes:
        accepted: Saves taken over.
        committed: Saves that became checkpoints.
        failed: Saves that did not.
        consecutive_failures: Since the last commit, or since they were last raised.
        nbytes: Committed, all ranks.
        last_error: Of the newest save, until it has been raised; None if that save was committed.
    """

    def __init__(self, life: Life, on_end: Callable[[], None]) -> None:
        self._life, self._on_end = life, on_end
        self._queue: queue.SimpleQueue[Save | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._current = ""
        self.accepted = self.committed = self.failed = self.consecutive_failures = self.nbytes = 0
        self.last_error: SaveError | None = None
        self._thread = threading.Thread(target=self._run, name="dcpsvc-uploader", daemon=True)
        self._thread.start()

    def accept(self, save: Save) -> None:
        """Take a save over from the training thread. The one before must have ended."""
        self.accepted += 1
        self._current = f"step {save.key.step}"
        self._idle.clear()
        self._queue.put(save)

    def wait(self, timeout_s: float | None) -> None:
        """Until nothing is under way. Without a timeout, those of its stages bound it.

        Raises:
            WaitTimeoutError: Something still is.
        """
        if not self._idle.wait(timeout_s):
            raise WaitTimeoutError(timeout_s or 0.0, (self._current,))

    def raise_if_spent(self, budget: int) -> None:
        """Raise the last failure once there were ``budget`` in a row, and count anew; that of a replaced job always."""
        if isinstance(self.last_error, FencedError):
            raise self.last_error
        if self.consecutive_failures >= budget and self.last_error is not None:
            error, self.last_error, self.consecutive_failures = self.last_error, None, 0
            raise error

    def stop(self) -> None:
        """End the thread. A save still under way is abandoned: it fails at its next meeting, on every rank.

        What the thread uses is let go by the thread itself, when it has ended.
        """
        self._life.abandoned.set()
        self._queue.put(None)
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        try:
            while (save := self._queue.get()) is not None:
                try:
                    self._count(save, self._life.live(save))
                finally:
                    self._idle.set()
        finally:
            self._on_end()

    def _count(self, save: Save, error: SaveError | None) -> None:
        self.last_error = error
        if error is None:
            self.committed += 1
            self.consecutive_failures = 0
            self.nbytes += save.pending.timings.nbytes
        else:
            self.failed += 1
            self.consecutive_failures += 1
