"""The clock by which a store dates what is written."""

from __future__ import annotations

import contextlib
import time
from typing import NamedTuple

from dcpsvc.errors import StoreError
from dcpsvc.storage.base import Store, written_s


class Ahead(NamedTuple):
    """How far a store's clock is ahead of this machine's, and how long it took to ask: less cannot be told."""

    seconds: float
    within_s: float


def ahead(store: Store, key: str) -> Ahead | None:
    """Compare the date of a small object with this machine's clock; None if the store has no dates.

    Args:
        store: Where.
        key: Of the object, which is removed again.

    Raises:
        StoreError: It could not be written or read.
    """
    before_s = time.time()
    store.put(key, b"clock\n")
    after_s = time.time()
    try:
        date_s = written_s(store, key)
    finally:
        with contextlib.suppress(StoreError):  # an old probe, that whoever clears next removes
            store.delete(key)
    return None if date_s is None else Ahead(date_s - (before_s + after_s) / 2, after_s - before_s)


def assumed_ahead_s(store: Store, key: str) -> float:
    """As :func:`ahead`; a store that cannot be written, or has no dates, is taken to agree with this machine."""
    try:
        found = ahead(store, key)
    except StoreError:
        return 0.0
    return 0.0 if found is None else found.seconds
