"""Who owns a run root: the job that claimed it last. What an older one writes afterwards does not count.

A job claims an epoch larger than any other, lists what is committed, and writes that list down: its inheritance. A
reader counts a manifest of an older epoch only if the newest inheritance names it. A job that commits looks for
a newer claim after the manifest is written: if there is none, whoever claims later lists later and inherits it; if
there is one, the newer inheritance decides. So two jobs never disagree about a commit, whatever the order
of their writes, on any store whose listings show what was written before. Conditional writes are not needed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc.errors import FormatError, RootError, RunBusyError, StoreError, StoreNotFoundError
from dcpsvc.format import epochs
from dcpsvc.format.epochs import Claim, Inheritance
from dcpsvc.format.keys import EPOCHS, MAX_EPOCH, Epoch, epoch_of
from dcpsvc.storage.conflict import holds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Entry, Store

_KEPT = 3
"""Epochs whose files stay, for people who wonder what happened."""


def claim(store: Store, make: Callable[[int], Claim]) -> Claim:
    """Take a run root over. Coordinator.

    Of several that claim at once one wins: who made the largest claim sees none that is larger. The others do not try
    again, for they would only take it away from the winner.

    Args:
        store: The run root.
        make: Makes the claim with a number.

    Raises:
        RunBusyError: Another job has claimed it meanwhile, or the numbers are used up.
        StoreError: It cannot be written, or does not read back as it was written.
    """
    number = _largest(store).number
    if number >= MAX_EPOCH:
        raise RunBusyError(store.url, f"epoch {number} is the last there can be; use another run root")
    mine = make(number + 1)
    _write(store, mine.epoch, mine.epoch.claim, mine.dumps())
    if (largest := _largest(store)) > mine.epoch:
        raise RunBusyError(store.url, f"{describe(store, largest)} has just taken it over")
    return mine


def inherit(store: Store, epoch: Epoch, attempts: Iterable[Attempt]) -> None:
    """Write down what counts of the time before; older epochs' files go, but for the last few.

    Raises:
        StoreError: It cannot be written, or does not read back as it was written.
    """
    _write(store, epoch, epoch.inheritance, Inheritance(epoch=epoch, attempts=frozenset(attempts)).dumps())
    for key, (older, _) in _epochs(store.list(EPOCHS)):
        if older.number < epoch.number - _KEPT:
            store.delete(key)


def _write(store: Store, epoch: Epoch, key: str, data: bytes) -> None:
    """A claim or inheritance that were damaged would be passed over, so none may be; one that is gone was replaced."""
    store.create(key, data)
    if not holds(store, key, data) and _largest(store) <= epoch:
        raise StoreError("create", key, "does not read back as it was written")


def successor(store: Store, epoch: Epoch) -> str:
    """Who has taken over since, for people; empty if nobody has. One LIST of a few names.

    Raises:
        RootError: The claim itself is gone: somebody has moved or emptied the run root.
    """
    newest = _newest(store.list(EPOCHS), epoch, store.url)
    return "" if newest == epoch else describe(store, newest)


def replaced(epoch: Epoch, theirs: str) -> str:
    """Why a job of ``epoch`` saves no more, for people."""
    return f"this job {epoch.token} (epoch {epoch.number}) was replaced by {theirs}"


def _newest(entries: Iterable[Entry], mine: Epoch, where: str) -> Epoch:
    claims = [epoch for _, (epoch, inherited) in _epochs(entries) if not inherited]
    newest = max(claims, default=mine)
    if newest < mine or not claims:
        raise RootError(where, f"the claim of epoch {mine.number} is gone: was the run root moved or emptied?")
    return newest


def describe(store: Store, epoch: Epoch) -> str:
    """An epoch's claim, for people."""
    try:
        return str(epochs.load_claim(epoch.claim, store.get(epoch.claim, max_nbytes=epochs.MAX_CLAIM_NBYTES)))
    except (StoreError, FormatError):  # who it is matters less than that it is
        return f"job {epoch.token} (epoch {epoch.number})"


def newest_inheritance(store: Store, entries: Iterable[Entry]) -> Inheritance | None:
    """The newest inheritance among ``entries``; None where no job of ours has taken the place over.

    One that is damaged is passed over: then the one before decides, or none.
    """
    found = sorted((epoch for _, (epoch, inherited) in _epochs(entries) if inherited), reverse=True)
    for epoch in found:
        try:
            return epochs.load_inheritance(
                epoch.inheritance, store.get(epoch.inheritance, max_nbytes=epochs.MAX_NBYTES)
            )
        except (FormatError, StoreNotFoundError) as err:
            logging.getLogger("dcpsvc").warning("an inheritance is passed over: %s", err)
    return None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a manifest that was just written counts.

    Attributes:
        counts: None if nobody knows yet: a newer job has not said what it inherits.
        theirs: Who has taken over; empty if nobody has.
    """

    counts: bool | None
    theirs: str


def verdict(store: Store, attempt: Attempt) -> Verdict:
    """See :class:`Verdict`. Only the inheritance of the newest claimant is final.

    Raises:
        RootError: The claim of the attempt's own epoch is gone.
    """
    entries = store.list(EPOCHS)
    newer = _newest(entries, attempt.epoch, store.url)
    if newer == attempt.epoch:
        return Verdict(counts=True, theirs="")
    inheritance = newest_inheritance(store, entries)
    if inheritance is None or inheritance.epoch != newer:
        return Verdict(counts=None, theirs=describe(store, newer))
    return Verdict(counts=inheritance.counts(attempt), theirs=describe(store, newer))


def _largest(store: Store) -> Epoch:
    return max((epoch for _, (epoch, _) in _epochs(store.list(EPOCHS))), default=Epoch(0, ""))


def _epochs(entries: Iterable[Entry]) -> list[tuple[str, tuple[Epoch, bool]]]:
    named = ((entry.key, epoch_of(entry.key)) for entry in entries)
    return [(key, epoch) for key, epoch in named if epoch is not None]
