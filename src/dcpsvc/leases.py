"""Holding checkpoints while somebody reads them, for as long as that takes."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from dcpsvc import deletions
from dcpsvc.sidefiles import Lease

if TYPE_CHECKING:
    from collections.abc import Generator

    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Store

LEASE_S = 3600.0
"""So long what a killed reader held stays."""

_GOODBYE_S = 5.0
"""Longest that a renewal under way keeps the end of the reading; what it leaves ends by itself."""


@contextlib.contextmanager
def held(store: Store, *attempts: Attempt, seconds: float = LEASE_S) -> Generator[None]:
    """No live job deletes these meanwhile, however long it takes: a thread renews the leases at half their life.

    A root that cannot be written is read without; a deletion that has begun already is not stopped, and told as that.

    Args:
        store: The run root.
        attempts: Checkpoints there.
        seconds: Life of one lease.

    Raises:
        StepDeletedError: See :func:`dcpsvc.deletions.noticed`.
    """
    over = threading.Event()
    leases = [_taken(store, attempts, seconds)]

    def renew() -> None:
        while not over.wait(seconds / 2):
            leases.append(_taken(store, attempts, seconds))
            leases.pop(0).release()  # only when the next one stands

    thread = threading.Thread(target=renew, name="dcpsvc-lease", daemon=True)
    thread.start()
    try:
        with deletions.noticed(store, *attempts):
            yield
    finally:
        over.set()
        thread.join(_GOODBYE_S)
        for lease in leases:
            lease.release()


def _taken(store: Store, attempts: tuple[Attempt, ...], seconds: float) -> Lease:
    lease = Lease(store, seconds)
    for attempt in attempts:
        lease.take(attempt)
    return lease
