"""What the run root does for the ranks: permissions, listings, conditional create, whether it is shared. No torch."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from dcpsvc.doctor.findings import Finding, Verdict, broken, ok
from dcpsvc.errors import StoreError
from dcpsvc.progress import duration
from dcpsvc.storage import storeclock
from dcpsvc.storage.base import SigningStore
from dcpsvc.tools import remedies

if TYPE_CHECKING:
    from dcpsvc.storage.base import Store

_RACES, _RACERS = 5, 8
_LISTING_S, _LOOK_S = 5.0, 0.1
_MAX_SKEW_S = 1.0
_DATE_S = 1.0
"""What stores that date by the second leave open."""
_LONG_S = 86400.0


def permissions(store: Store, mine: str) -> Finding:
    """Write, list, read and delete a small object, as every rank of a job does."""
    step = "write"
    try:
        store.put(mine, b"doctor\n")
        step = "read"
        if store.get(mine, max_nbytes=64) != b"doctor\n":
            return _wrong("permissions", "what was written reads back as something else")
        step = "list"
        store.list("")
        step = "delete"
        store.delete(mine)
    except StoreError as err:
        remedy = remedies.remedy(err) or remedies.reach(store.url)
        return Finding(name="permissions", verdict=Verdict.FAIL, found=f"cannot {step}: {err}", remedy=remedy)
    return ok("permissions", "write, read, list and delete")


def listings(store: Store, mine: str) -> Finding:
    """Whether a listing shows at once what was written, and no more what was deleted."""
    try:
        store.put(mine, b"x")
        appeared_s = _until(store, mine, there=True)
        store.delete(mine)
        vanished_s = _until(store, mine, there=False)
    except StoreError as err:
        return broken("listings", err, remedies.reach(store.url))
    late_s = max(appeared_s, vanished_s)
    if not late_s:
        return ok("listings", "show at once what was written and deleted")
    found = f"lag behind writes by {'more than 5' if late_s == math.inf else f'{late_s:.1f}'} s"
    remedy = "a commit of the last moments before a kill may have to be finished again from the local tier"
    return Finding(name="listings", verdict=Verdict.WARN, found=found, remedy=remedy)


def _until(store: Store, key: str, *, there: bool) -> float:
    """Seconds until a listing tells the truth; 0.0 if the first one did, infinity if none did in time."""
    began = time.monotonic()
    waited_s = 0.0
    while any(entry.key == key for entry in store.list("")) is not there:
        time.sleep(_LOOK_S)
        waited_s = time.monotonic() - began
        if waited_s > _LISTING_S:
            return math.inf
    return waited_s


def conditional_create(store: Store, prefix: str) -> Finding:
    """Whether exactly one of several racing writers wins. Not needed for safety; good to have as a second fence."""
    try:
        winners = [_race(store, f"{prefix}-{number}") for number in range(_RACES)]
    except StoreError as err:
        return broken("conditional create", err, remedies.reach(store.url))
    found = f"{_RACERS} writers raced {_RACES} times; winners: {', '.join(map(str, winners))}"
    if winners == [1] * _RACES:
        return ok("conditional create", found)
    if 0 in winners:
        return Finding(name="conditional create", verdict=Verdict.FAIL, found=found, remedy=remedies.reach(store.url))
    note = f"{found}; commits are safe without it, by epochs and claims"
    return Finding(name="conditional create", verdict=Verdict.NOTE, found=note)


def _race(store: Store, key: str) -> int:
    with ThreadPoolExecutor(_RACERS) as threads:
        told = list(threads.map(lambda number: store.create(key, f"racer {number}\n".encode()), range(_RACERS)))
    store.delete(key)
    return sum(told)


def credentials(store: Store, save_s: float | None, now_s: float) -> list[Finding]:
    """How long the store will believe who we are; nothing where that is no question.

    Args:
        store: The run root.
        save_s: How long a save takes from its call to its commit; None if nobody knows.
        now_s: Seconds since 1970.
    """
    found = store.credentials() if isinstance(store, SigningStore) else None
    if found is None:
        return []
    if not found.temporary or found.renewed:
        how = "renewed by the client before they end" if found.temporary else "do not end by themselves"
        return [ok("credentials", f"{found.kind}: {how}")]
    remedy = "use a role that is renewed (instance, pod, or assume_role in a profile), or longer-lived keys"
    if found.ends_s is None:
        said = f"{found.kind}: temporary, and nobody says when they end"
        return [Finding(name="credentials", verdict=Verdict.NOTE, found=said, remedy=remedy)]
    left_s = found.ends_s - now_s
    said = f"{found.kind}: {f'end in {duration(left_s)}' if left_s > 0 else 'have ended'}"
    if left_s >= _LONG_S:
        return [ok("credentials", said)]
    dies = left_s <= (save_s or 0.0)
    verdict, what = (Verdict.FAIL, "before a save is done") if dies else (Verdict.WARN, "and a job dies with them")
    return [Finding(name="credentials", verdict=verdict, found=f"{said}, {what}", remedy=remedy)]


def shared(store: Store, theirs: str, expected: bytes) -> Finding:
    """Whether this rank sees, at the run root, what the first rank has just written there."""
    try:
        listed = any(entry.key == theirs for entry in store.list(""))
        same = store.get(theirs, max_nbytes=256) == expected
    except StoreError as err:
        found = f"what rank 0 wrote cannot be read here: {err}"
        remedy = "the run root must be one place for all ranks: a shared file system or an object store"
        return Finding(name="shared root", verdict=Verdict.FAIL, found=found, remedy=remedy)
    if listed and same:
        return ok("shared root", "every rank sees what rank 0 wrote")
    return _wrong("shared root", "this rank sees another object than rank 0 wrote" if listed else "not in the listing")


def clocks(times: list[float], within_s: float) -> Finding:
    """How far apart the ranks' clocks are; what they said was asked for at about one moment.

    Args:
        times: Each rank's wall clock.
        within_s: How long it took to ask them all: skew below it cannot be told.
    """
    skew = max(times) - min(times)
    found = f"{len(times)} ranks, at most {skew:.2f} s apart (asked within {within_s:.2f} s)"
    if skew <= _MAX_SKEW_S + within_s:
        return ok("clocks", found)
    first, last = times.index(min(times)), times.index(max(times))
    remedy = (
        f"start chrony or ntpd on the hosts of ranks {first} and {last}: ages mislead, leases allow for 5 min, and S3 "
        "refuses what is signed 15 min off"
    )
    return Finding(name="clocks", verdict=Verdict.WARN, found=found, remedy=remedy)


def store_clock(store: Store, mine: str) -> Finding:
    """How far this machine's clock and the store's are apart: ages in ``ls`` and ``gc`` come from both."""
    try:
        found = storeclock.ahead(store, mine)
    except StoreError as err:
        return broken("store clock", err, remedies.reach(store.url))
    if found is None:
        return ok("store clock", "the store has no dates")
    said = f"{abs(found.seconds):.1f} s {'ahead of' if found.seconds > 0 else 'behind'} this machine's"
    if abs(found.seconds) <= _MAX_SKEW_S + _DATE_S + found.within_s:
        return ok("store clock", said)
    remedy = "start chrony or ntpd here, or there: ages mislead, leases allow for 5 min, S3 refuses what is 15 min off"
    return Finding(name="store clock", verdict=Verdict.WARN, found=said, remedy=remedy)


def _wrong(name: str, found: str) -> Finding:
    return Finding(name=name, verdict=Verdict.FAIL, found=found, remedy="use another store: this one cannot hold a run")
