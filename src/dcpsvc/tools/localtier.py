"""The same on this node's disk: attempts that the run root has no more, and what killed writers left. Needs no torch.

What a start on this node would finish stays, and so does what is committed: the jobs themselves trim that.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc import placelock, tiers
from dcpsvc.errors import FormatError
from dcpsvc.format import keys
from dcpsvc.stages import discover
from dcpsvc.storage.posix import PosixStore
from dcpsvc.tools.clearplan import ATTEMPT, LAYOUT, Doomed, Going, Loose
from dcpsvc.tools.listing import LOCAL

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Mapping
    from pathlib import Path

    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.tools.clearing import Pace


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalLeftovers(Going):
    """What would go from this node's disk.

    Attributes:
        elsewhere: The run root that it belongs to, if that is another one with the same identity: nothing goes then.
        staying_nbytes: Of the attempts that stay here.
    """

    elsewhere: str = ""
    staying_nbytes: int = 0


def waiting(path: Path, committed: Collection[Attempt], url: str) -> frozenset[Attempt]:
    """Attempts that are whole on their nodes and newer than all commits: the next start finishes their upload."""
    if _of_another(path, url):
        return frozenset()
    newest = max((attempt.step for attempt in committed), default=-1)
    return frozenset(one for one, journal in _journal(path).items() if journal is not None and one.step > newest)


def find(path: Path, staying: Collection[Attempt], before_s: float, url: str) -> LocalLeftovers:
    """What no start needs. Reads only.

    Args:
        path: This node's tier of the run; it need not exist.
        staying: What is committed, and will be.
        before_s: Shards without a journal, newer than all commits, and layouts go only if written before that.
        url: Of the run root. A copy of it, or what it was copied from, has the same place here.

    Raises:
        StoreError: The disk does not answer.
    """
    if not path.is_dir():
        return LocalLeftovers()
    if elsewhere := _of_another(path, url):
        return LocalLeftovers(elsewhere=elsewhere)
    store, journal, here = PosixStore(path), _journal(path), dict[keys.Attempt, int]()
    for entry in store.list(keys.DATA):
        if (attempt := keys.attempt_below(entry.key)) is not None:
            here[attempt] = here.get(attempt, 0) + entry.nbytes
    stays = {*staying, *waiting(path, staying, url)}
    newest = max((attempt.step for attempt in staying), default=-1)
    doomed: list[Doomed] = []
    for attempt in sorted({*here, *journal} - stays):
        dates = [store.written_s(entry.key) for entry in store.list(attempt.data)]
        if attempt.step <= newest or attempt in journal or all(date <= before_s for date in dates):
            why = "the run root has it no more" if attempt.step <= newest else "no journal: nobody can finish it"
            doomed.append(Doomed(attempt, ATTEMPT, why, here.get(attempt, 0), LOCAL))
        else:
            stays.add(attempt)
    return LocalLeftovers(
        doomed=tuple(doomed),
        loose=tuple(_layouts(store, {one: about for one, about in journal.items() if one in stays}, before_s)),
        unfinished=store.remove_unfinished(before_s, dry_run=True),
        staying_nbytes=sum(here.values()) - sum(one.nbytes for one in doomed),
    )


def clear(path: Path, found: LocalLeftovers, before_s: float, pace: Pace) -> None:
    """Remove it: of each attempt the journal first.

    Raises:
        RunBusyError: A process of the run lives on this node.
        StoreError: The disk does not answer.
    """
    if found.is_empty:
        return
    store = PosixStore(path)
    with _alone(path):
        for one in found.doomed:
            store.delete(one.attempt.manifest)
            for entry in store.list(one.attempt.data):
                pace.more(entry.nbytes)
                store.delete(entry.key)
        for loose in found.loose:
            pace.more(loose.nbytes)
            store.delete(loose.key)
        store.remove_unfinished(before_s)


@contextlib.contextmanager
def _alone(path: Path) -> Generator[None]:
    """Hold the place of every rank that was ever here."""
    held: list[int] = []
    try:
        held += [placelock.take(lock) for lock in sorted(path.glob("rank-*.lock"))]
        yield
    finally:
        for lock in held:
            placelock.release(lock)


def _of_another(path: Path, url: str) -> str:
    noted = tiers.noted_root(path)
    return noted if noted != url else ""


def _journal(path: Path) -> dict[Attempt, Manifest | None]:
    """Manifests on this disk; None for one that does not validate."""
    if not path.is_dir():
        return {}
    store, found = PosixStore(path), dict[keys.Attempt, "Manifest | None"]()
    for entry in store.list(keys.MANIFESTS):
        if (attempt := keys.attempt_of(entry.key)) is not None:
            try:
                found[attempt] = discover.read_manifest(store, attempt)
            except FormatError:  # a torn journal entry is none
                found[attempt] = None
    return found


def _layouts(store: PosixStore, journal: Mapping[Attempt, Manifest | None], before_s: float) -> list[Loose]:
    named = {about.layout.path for about in journal.values() if about is not None}
    return [
        Loose(entry.key, LAYOUT, "no manifest names it", entry.nbytes, LOCAL)
        for entry in store.list(keys.LAYOUTS)
        if keys.is_layout(entry.key) and entry.key not in named and store.written_s(entry.key) <= before_s
    ]
