"""The uploader: one background thread that takes saves to their commit, one after the other."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from dcpsvc.errors import FencedError, RankFailure, SaveError, SaveFailedError, SaveSkippedError, WaitTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from dcpsvc.life import Life
    from dcpsvc.save import Save

_FAILURES_TOLD = 3


class Uploader:
    """The thread and its counters.

    Args:
        life: Of a save.
        on_end: Called on the thread when it has ended.
        after: Called on the thread after each save; must not raise.

    Attributes:
        accepted: Saves taken over.
        committed: Saves that became checkpoints.
        failed: Saves that did not.
        skipped: Saves given up for newer ones.
        consecutive_failures: Since the last commit, or since they were last raised.
        nbytes: Committed, all ranks.
        failures: Why the last few that failed did.
        last_error: Of the newest save, until it has been raised; None if that save was committed.
    """

    def __init__(self, life: Life, on_end: Callable[[], None], after: Callable[[], None] = lambda: None) -> None:
        self._life, self._on_end, self._after = life, on_end, after
        self._saves: deque[Save] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self.accepted = self.committed = self.failed = self.skipped = self.consecutive_failures = self.nbytes = 0
        self.failures: deque[str] = deque(maxlen=_FAILURES_TOLD)
        self.last_error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="dcpsvc-uploader", daemon=True)
        self._thread.start()

    def accept(self, save: Save) -> None:
        """Take a save over from the training thread."""
        self.accepted += 1
        with self._changed:
            self._saves.append(save)
            self._changed.notify_all()
        save.pending.committed.add_done_callback(functools.partial(self._has_ended, save))

    def _has_ended(self, save: Save, committed: Future[None]) -> None:
        """It is committed, or has failed; what is left to do about it goes on."""
        with self._changed:
            self._count(save, committed.exception())
            self._changed.notify_all()

    @property
    def under_way(self) -> tuple[Save, ...]:
        """Saves that are neither committed nor failed, oldest first. Any thread."""
        with self._changed:
            return tuple(save for save in self._saves if not save.pending.committed.done())

    def wait(self, timeout_s: float | None, *, below: int = 1) -> None:
        """Until nothing is under way, retention included. Without a timeout, those of its stages bound it.

        Args:
            timeout_s: Longest wait.
            below: Until fewer saves than this are under way; from 2 on, retention is not waited for.

        Raises:
            WaitTimeoutError: Something still is.
        """
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self._count_under_way(below) >= below:
                left_s = None if ends is None else ends - time.monotonic()
                if left_s is not None and left_s <= 0:
                    raise WaitTimeoutError(timeout_s or 0.0, tuple(f"step {save.key.step}" for save in self._saves))
                self._changed.wait(left_s)

    def _count_under_way(self, below: int) -> int:
        return len(self._saves) if below == 1 else sum(not save.pending.committed.done() for save in self._saves)

    def raise_if_spent(self, budget: int) -> None:
        """Raise the last failure once there were ``budget`` in a row, and count anew; that of a replaced job always."""
        if isinstance(self.last_error, FencedError):
            raise self.last_error
        if self.consecutive_failures >= budget and self.last_error is not None:
            error, self.last_error, self.consecutive_failures = self.last_error, None, 0
            raise error

    def abandon(self) -> None:
        """A save still under way fails at its next meeting, on every rank."""
        self._life.abandoned.set()

    def stop(self) -> None:
        """End the thread, and abandon what is under way.

        What the thread uses is let go by the thread itself, when it has ended.
        """
        self.abandon()
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        try:
            while (save := self._next()) is not None:
                try:
                    self._live(save)
                finally:
                    with self._changed:
                        self._saves.popleft()
                        self._changed.notify_all()
                if not self._stopping:
                    self._after()  # nobody waits for this one any more
        finally:
            self._on_end()

    def _live(self, save: Save) -> None:
        """Whatever comes out of it, the next save has an uploader."""
        try:
            self._life.live(save)
        except BaseException as err:  # a defect of ours: nobody must wait for this save for ever
            logging.getLogger("dcpsvc").exception("step %s: the uploader goes on", save.key.step)
            failure = RankFailure(-1, "uploader", type(err).__name__, str(err))
            error = SaveFailedError(*save.key, self._life.catalog.newest, (failure,))
            save.pending.resolve(save.pending.committed, error)

    def _next(self) -> Save | None:
        with self._changed:
            while not self._saves and not self._stopping:
                self._changed.wait()
            return self._saves[0] if self._saves else None

    def _count(self, save: Save, error: BaseException | None) -> None:
        if isinstance(error, SaveSkippedError):
            self.skipped += 1
            return
        self.last_error = error
        if error is None:
            self.committed += 1
            self.consecutive_failures = 0
            self.nbytes += save.pending.timings.nbytes
        else:
            self.failed += 1
            self.failures.append(_cause(error))
            self.consecutive_failures += 1


def _cause(error: BaseException) -> str:
    """What it says, without what was intact then."""
    return str(error).removesuffix(f"; {error.intact}") if isinstance(error, SaveError) else str(error)
