"""How much patience one operation has left, and what is said when it has none."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dcpsvc.errors import StoreError
from dcpsvc.storage.tries import count_one

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    import tenacity

_TRIED = " (tried "
_log = logging.getLogger(__name__)


class Patience:
    """How much of it one operation has left."""

    def __init__(self, clock: Callable[[], float], tries: int, deadline_s: float, stop: threading.Event) -> None:
        self._clock, self._tries, self._deadline_s, self._stop = clock, tries, deadline_s, stop
        self._failing_since: float | None = None
        self._tries_made = 0
        self.last: StoreError | None = None

    def forgives(self, err: BaseException) -> bool:
        """Whether an error is worth another try at all."""
        if not (isinstance(err, StoreError) and err.transient):
            return False
        self.last = err
        self._tries_made += 1
        if self._failing_since is None:
            self._failing_since = self._clock()
        return True

    def told(self, err: StoreError) -> StoreError:
        """The same, for people: what was done about it."""
        if self._failing_since is None or self._tries_made == 1 or _TRIED in err.reason:  # as parts of an upload do
            return err
        tries = f"{_TRIED}{self._tries_made} times in {self._clock() - self._failing_since:.1f} s)"
        return type(err)(err.operation, err.where, err.reason + tries)

    def is_over(self, state: tenacity.RetryCallState) -> bool:
        """Whether the try that just failed was the last."""
        failing_s = 0.0 if self._failing_since is None else self._clock() - self._failing_since
        late = failing_s + state.upcoming_sleep > self._deadline_s
        return late or state.attempt_number >= self._tries or self._stop.is_set()


def log_retry(state: tenacity.RetryCallState) -> None:
    """A line before each further try."""
    count_one()
    error = state.outcome.exception() if state.outcome else None
    _log.warning("event=store_retry attempt=%d wait_s=%.2f error=%s", state.attempt_number, state.upcoming_sleep, error)
