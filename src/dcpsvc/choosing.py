"""Choosing the commit to load: one LIST, the newest manifest that counts, and a look at what it names."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dcpsvc import deletions, sidefiles
from dcpsvc.commits import is_diverged
from dcpsvc.errors import FormatError, StepDeletedError
from dcpsvc.listed import Listed
from dcpsvc.stages import discover

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.layout import Layout
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.storage.base import Store


class Found(NamedTuple):
    """A commit, as far as it was looked at.

    Attributes:
        manifest: Its commit record.
        metrics: What that says, with what was recorded later, if that was asked for.
        layout: If that was read.
    """

    manifest: Manifest
    metrics: Mapping[str, float]
    layout: Layout | None = None


Look = Callable[["Store", "Manifest"], Found]
"""How closely to look at a commit; raises FormatError for one that cannot be loaded."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which commit to load.

    Attributes:
        found: None if there is none to load.
        rejected: What newer ones lack, a line each.
        passed: Those.
        steps: Everything that is committed, whole or not, where nothing was found.
        deleted: The step that was named is being deleted, or was meanwhile.
    """

    found: Found | None
    rejected: tuple[str, ...]
    passed: tuple[Attempt, ...]
    steps: tuple[int, ...] = ()
    deleted: StepDeletedError | None = None


def told(_: Store, found: Manifest) -> Found:
    """What its manifest says. No request."""
    return Found(found, found.metrics)


def looked(store: Store, found: Manifest) -> Found:
    """All its files are there, with their sizes; and its metrics of now. Three requests, of a distant store at once."""
    return _looked(store, found, discover.check_layout)


def opened(store: Store, found: Manifest) -> Found:
    """Likewise, with the layout, which is read."""
    return _looked(store, found, discover.read_layout)


def _looked(store: Store, found: Manifest, layout: Callable[[Store, Manifest], Layout | None]) -> Found:
    if not getattr(store, "distant", False):
        discover.check_shards(store, found)
        return Found(found, sidefiles.metrics_of(store, found), layout(store, found))
    with ThreadPoolExecutor(2, thread_name_prefix="dcpsvc-store") as pool:
        read, metrics = pool.submit(layout, store, found), pool.submit(sidefiles.metrics_of, store, found)
        discover.check_shards(store, found)
        return Found(found, metrics.result(), read.result())  # each request ends by the deadline of its client


def choose(
    store: Store,
    step: int | None,
    tried: Collection[Attempt] = (),
    *,
    even_diverged: bool = False,
    look: Look = opened,
    deleted: Collection[Attempt] = (),
) -> Choice:
    """The newest commit that looks whole and was not tried, or that of ``step``. One LIST, then newest first.

    One that is tagged as diverged is passed over, unless it is named or ``even_diverged``. Of a step that is not there
    is said that it is being deleted, or was: since somebody saw it, or because the caller knows of one ``deleted``.

    Raises:
        StoreError: The store could not be asked.
    """
    listed = Listed(store)
    rejected: list[str] = []
    passed: list[Attempt] = []
    for attempt in _newest_first(store, listed, step):
        if attempt in tried:
            continue
        try:
            found = look(store, discover.read_manifest(store, attempt))
            if step is not None or even_diverged or not is_diverged(found.metrics):
                return Choice(found, tuple(rejected), tuple(passed))
            reason = "tagged as diverged"
        except FormatError as err:
            reason = str(err)
        rejected.append(f"step {attempt.step}: {reason}")
        passed.append(attempt)
    gone = None if step is None else _deleted(store, step, [*tried, *passed], deleted)
    steps = gone.available if gone else dict.fromkeys(attempt.step for attempt in listed.counting())
    return Choice(None, tuple(rejected), tuple(passed), tuple(steps), gone)


def _deleted(
    store: Store, step: int, seen: Collection[Attempt], deleted: Collection[Attempt]
) -> StepDeletedError | None:
    seen = [one for one in seen if one.step == step]
    try:
        deletions.check_step(store, step, None, seen)
    except StepDeletedError as err:
        return err
    known = [one for one in deleted if one.step == step and not seen]
    return deletions.error(store, known[-1], was_committed=False) if known else None


def _newest_first(store: Store, listed: Listed, step: int | None) -> Iterator[Attempt]:
    """Those that count. Nobody asks about older ones before newer ones were of no use."""
    for each, same in itertools.groupby(listed, key=lambda attempt: attempt.step):
        if step in {None, each}:
            yield from discover.newest_first(store, filter(functools.partial(Listed.counts, listed), same))
