"""The end of a job: everything committed, or as much as the time that is left allows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc.errors import WaitTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.announcing import Announcer
    from dcpsvc.catalog import Catalog
    from dcpsvc.steering import Steering
    from dcpsvc.uploader import Uploader

_LOOK_S = 0.2


@dataclass(slots=True)
class Ending:
    """Waits for what is under way. Training thread."""

    uploader: Uploader
    steering: Steering
    announcer: Announcer
    catalog: Catalog

    def finish(self, timeout_s: float | None, save_last: Callable[[], None]) -> None:
        """Until everything is committed, the last step too.

        Args:
            timeout_s: Longest wait.
            save_last: Begins the last save, if there has to be one.

        Raises:
            WaitTimeoutError: ``timeout_s`` has passed. Where a preemption set the limit that is only said.
        """
        limit_s = 0.0 if self.steering.aborted else timeout_s
        ends = None if limit_s is None else time.monotonic() + limit_s
        try:
            self._wait_until(ends)
            save_last()
            self._wait_until(ends)
        except WaitTimeoutError as err:
            if self.steering.left_s() is None and not self.steering.aborted:
                raise
            self.announcer.cut_short(err.pending, self.catalog.newest_local)

    def _wait_until(self, ends: float | None) -> None:
        """Until nothing is under way. A preemption may come meanwhile: its grace counts from then on."""
        while True:
            left = [left_s for left_s in (_left_s(ends), self.steering.left_s()) if left_s is not None]
            try:
                return self.uploader.wait(min([*left, _LOOK_S]))
            except WaitTimeoutError:
                if left and min(left) <= 0:
                    self.steering.end_early()
                    raise


def _left_s(ends: float | None) -> float | None:
    return None if ends is None else max(0.0, ends - time.monotonic())
