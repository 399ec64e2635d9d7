"""Metrics that come late, and pins: written beside a checkpoint by anybody, read together by whoever asks.

A checkpoint is what its manifest says it is, whatever lies beside it: nothing here makes one, and none needs any of it.

Pinning against deleting: who deletes leaves a tombstone, then looks for pins; who pins leaves the pin, then looks for a
tombstone. So one of the two steps back, or both, whatever the order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from dcpsvc.errors import CheckpointGoneError, ConfigError, FormatError, StoreError, StoreNotFoundError
from dcpsvc.format import keys, sidefiles
from dcpsvc.policies import is_name
from dcpsvc.storage.base import create_fleeting, delete_fleeting, is_there
from dcpsvc.storage.threads import each

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.format.sidefiles import Pin
    from dcpsvc.storage.base import Store

T = TypeVar("T")

logger = logging.getLogger("dcpsvc")

CLOCK_SLACK_S = 300
"""How much the clocks of two machines may differ: so much longer than it says a lease is honoured."""

_MAX_METRICS = 1000


def record(store: Store, attempt: Attempt, metrics: Mapping[str, float]) -> None:
    """Add numbers to a committed checkpoint; where two records name the same metric, the later one counts.

    Two that are written at the same moment are ordered by chance, and alike for every reader.

    Raises:
        ConfigError: Something in ``metrics`` is no number.
        CheckpointGoneError: The checkpoint is not, or no longer, there; nothing of the record stays.
        StoreError: The store said no.
    """
    checked = numbers_of(metrics)
    _check_there(store, attempt)
    found = [named[1] for entry in store.list(attempt.metrics) if (named := keys.record_of(entry.key))]
    key = attempt.record(min(max(found, default=0) + 1, keys.MAX_RECORDS), secrets.token_hex(4))
    store.create(key, sidefiles.Record(attempt=attempt, recorded=_now(), metrics=checked).dumps())
    _take_back_if_gone(store, attempt, key)


def numbers_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics as given by the user, as floats.

    Raises:
        ConfigError: Something is no number, or there are too many.
    """
    if not metrics or len(metrics) > _MAX_METRICS:
        raise ConfigError(f"metrics: {len(metrics)} of them; 1 to {_MAX_METRICS} can be recorded at once")
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if not is_name(name) or len(name) > sidefiles.MAX_TEXT:
            raise ConfigError(f"metrics: {name!r} is not a name")
        try:
            found[name] = float(value) if not isinstance(value, str | bytes) else _refuse(value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as err:
            raise ConfigError(f"metrics: {name!r} is not a number but {type(value).__name__}") from err
    return found


def _refuse(value: object) -> float:
    raise TypeError(value)


def pin(store: Store, attempt: Attempt, note: str = "") -> None:
    """Have a committed checkpoint stay until :func:`unpin`, whatever the policy. It stays once this has returned.

    Raises:
        CheckpointGoneError: It is not there, or is being deleted; nothing of the pin stays.
        StoreError: The store said no.
    """
    if len(note) > sidefiles.MAX_TEXT or not (note.isprintable() or not note):
        raise ConfigError(f"note: at most {sidefiles.MAX_TEXT} printable characters")
    _check_there(store, attempt)
    key = attempt.pin(secrets.token_hex(4))
    store.create(key, _pin(attempt, note))
    _take_back_if_gone(store, attempt, key, condemned_too=True)


def unpin(store: Store, attempt: Attempt) -> int:
    """Take away every pin of a checkpoint, but for leases; says how many there were."""
    found = pins_of(store, attempt)
    for key in found:
        store.delete(key)
    return len(found)


def unpin_step(store: Store, step: int) -> int:
    """The same of every attempt of a step, for one that is pinned keeps all of them."""
    named = (keys.pin_of(entry.key) for entry in store.list(keys.PINS))
    return sum(unpin(store, attempt) for attempt in sorted({pin[0] for pin in named if pin and pin[0].step == step}))


def pins_of(store: Store, attempt: Attempt) -> list[str]:
    """Keys of the pins of a checkpoint, but for leases."""
    named = ((entry.key, keys.pin_of(entry.key)) for entry in store.list(attempt.pins))
    return [key for key, pin in named if pin is not None and pin[1] is None]


@dataclass(slots=True)
class Lease:
    """Keeps checkpoints from being deleted while somebody reads them: pins that end by themselves.

    A deletion that has begun already is not stopped: the reader then finds a file missing, and takes another
    checkpoint. A root that cannot be written is read without.

    Attributes:
        store: The run root.
        seconds: How long a reader needs at most; it gives the lease back before.
    """

    store: Store
    seconds: float
    _held: list[str] = field(default_factory=list[str])

    def take(self, attempt: Attempt) -> None:
        """Hold a checkpoint. Never raises."""
        key = attempt.pin(secrets.token_hex(4), min(int(time.time() + self.seconds) + 1, keys.MAX_UNTIL_S))
        self._held.append(key)  # before the answer, which may be lost
        try:
            create_fleeting(self.store, key, _pin(attempt, "being read"))
        except StoreError as err:
            logger.debug("step %s is read without a lease: %s", attempt.step, err)

    def release(self) -> None:
        """Hold nothing any more. Never raises: what stays ends by itself."""
        for key in self._held:
            with contextlib.suppress(StoreError):
                delete_fleeting(self.store, key)
        self._held.clear()


def metrics_of(store: Store, found: Manifest) -> dict[str, float]:
    """The metrics of one checkpoint, with what was recorded later. One LIST."""
    merged = dict(found.metrics)
    for entry in store.list(found.key.metrics):
        if keys.record_of(entry.key) is not None:
            merged |= _read_record(store, entry.key) or {}
    return merged


def is_pinned(store: Store, attempt: Attempt, now_s: float) -> bool:
    """Whether somebody wants it to stay at this moment. One LIST."""
    return any(_counts(entry.key, now_s) for entry in store.list(attempt.pins))


def forget(store: Store, attempt: Attempt) -> None:
    """Delete what lies beside a checkpoint that is gone."""
    for prefix in (attempt.metrics, attempt.pins):
        for entry in store.list(prefix):
            store.delete(entry.key)
    store.delete(attempt.lineage)


def beside(store: Store) -> set[Attempt]:
    """Attempts with something beside them. Two LISTs."""
    entries = [*store.list(keys.METRICS), *store.list(keys.PINS)]
    return {attempt for entry in entries if (attempt := keys.attempt_beside(entry.key)) is not None}


class SideFiles:
    """All metrics and pins of a run root, as of the last look. Reads each file once, for none ever changes.

    Args:
        store: The run root.
        readers: How many files are read at once.
    """

    def __init__(self, store: Store, *, readers: int = 1) -> None:
        self._store, self._readers = store, readers
        self._records: dict[str, Mapping[str, float]] = {}
        self._pins: dict[str, str] = {}

    def look(self) -> None:
        """Two LISTs, and what is new in them. A damaged file is passed over, but a pin pins whatever is in it.

        Raises:
            StoreError: Nobody knows what is there.
        """
        self._records = self._read(
            keys.METRICS, self._records, lambda key: keys.record_of(key) is not None, self._record
        )
        self._pins = self._read(keys.PINS, self._pins, lambda key: keys.pin_of(key) is not None, self._note)

    def metrics(self, found: Mapping[Attempt, Mapping[str, float]]) -> dict[Attempt, dict[str, float]]:
        """What manifests say, with what was recorded later; by name, the latest counts."""
        merged = {attempt: dict(metrics) for attempt, metrics in found.items()}
        for key in sorted(self._records):
            named = keys.record_of(key)
            if named is not None and named[0] in merged:
                merged[named[0]] |= self._records[key]
        return merged

    def pins(self, now_s: float) -> dict[Attempt, tuple[str, ...]]:
        """Why checkpoints must stay at this moment."""
        found: dict[Attempt, list[str]] = defaultdict(list)
        for key, why in sorted(self._pins.items()):
            named = keys.pin_of(key)
            if named is not None and _counts(key, now_s) and why not in found[named[0]]:
                found[named[0]].append(why)
        return {attempt: tuple(reasons) for attempt, reasons in found.items() if reasons}

    def _read(
        self, prefix: str, known: Mapping[str, T], ours: Callable[[str], bool], read: Callable[[str], T | None]
    ) -> dict[str, T]:
        listed = [entry.key for entry in self._store.list(prefix) if ours(entry.key)]
        new = [key for key in listed if key not in known]
        fresh = dict(zip(new, each(read, new, self._readers), strict=True))
        found = {key: known[key] if key in known else fresh[key] for key in listed}
        return {key: value for key, value in found.items() if value is not None}

    def _record(self, key: str) -> Mapping[str, float] | None:
        return _read_record(self._store, key)

    def _note(self, key: str) -> str | None:
        named = keys.pin_of(key)
        what = "pinned" if named is None or named[1] is None else f"being read until {_time(named[1])}"
        try:
            about = sidefiles.load_pin(key, self._store.get(key, max_nbytes=sidefiles.MAX_NBYTES))
        except StoreNotFoundError:
            return None
        except FormatError as err:
            logger.warning("a pin is damaged, and honoured all the same: %s", err)
            return what
        return _told(what, about)


def _read_record(store: Store, key: str) -> Mapping[str, float] | None:
    """None if it is gone. A damaged one says nothing."""
    try:
        return sidefiles.load_record(key, store.get(key, max_nbytes=sidefiles.MAX_NBYTES)).metrics
    except StoreNotFoundError:
        return None
    except FormatError as err:
        logger.warning("metrics are passed over: %s", err)
        return {}


def _told(what: str, about: Pin) -> str:
    if what != "pinned":
        return f"{what} by {about.by}"
    return f"pinned: {about.note}" if about.note else "pinned"


def _pin(attempt: Attempt, note: str) -> bytes:
    by = f"process {os.getpid()} on {socket.gethostname()}"
    return sidefiles.Pin(attempt=attempt, created=_now(), by=by, note=note).dumps()


def _counts(key: str, now_s: float) -> bool:
    named = keys.pin_of(key)
    return named is not None and (named[1] is None or now_s < named[1] + CLOCK_SLACK_S)


def _check_there(store: Store, attempt: Attempt) -> None:
    if not is_there(store, attempt.manifest):
        raise CheckpointGoneError(store.url, attempt.step, "it is not committed, or deleted")


def _take_back_if_gone(store: Store, attempt: Attempt, key: str, *, condemned_too: bool = False) -> None:
    """Beside a checkpoint that was deleted meanwhile nothing may stay."""
    reason = "" if is_there(store, attempt.manifest) else "it was deleted meanwhile"
    if not reason and condemned_too and is_there(store, attempt.tombstone):
        reason = "its deletion has begun; if that was broken off, the next start of the job decides anew"
    if reason:
        store.delete(key)
        raise CheckpointGoneError(store.url, attempt.step, reason)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
