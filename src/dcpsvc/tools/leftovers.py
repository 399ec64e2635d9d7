"""What a run root holds that is not to stay: each thing with a reason and its bytes. Reads only; needs no torch.

Two kinds: attempts, which go as a whole by the one way there is (:mod:`dcpsvc.stages.retain`), and single files.
"""

from __future__ import annotations

import math
import secrets
from typing import TYPE_CHECKING

from dcpsvc import deletions, keeping
from dcpsvc.errors import NoSuchStepError, RemovalRefusedError, StoreError, StoreNotFoundError
from dcpsvc.format import keys
from dcpsvc.format.keys import MAX_EPOCH, Epoch
from dcpsvc.sidefiles import CLOCK_SLACK_S, SideFiles
from dcpsvc.stages import discover, retain
from dcpsvc.storage import storeclock
from dcpsvc.storage.base import written_s
from dcpsvc.storage.threads import at_once, each
from dcpsvc.tools.clearplan import (
    ATTEMPT,
    CHECKPOINT,
    DAMAGED,
    LAYOUT,
    LEASE,
    ORPHAN,
    PROBE,
    TOMBSTONE,
    Doomed,
    Leftovers,
    Loose,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from dcpsvc.format.keys import Attempt
    from dcpsvc.stages.discover import Seen
    from dcpsvc.storage.base import Entry, Store
    from dcpsvc.tools.clearrules import Rules

_ANY_EPOCH = Epoch(MAX_EPOCH + 1, "")
"""Later than each: what does not count is nobody's."""


def find(store: Store, rules: Rules, now_s: float) -> Leftovers:
    """Look at everything: the LISTs of a listing and of the small folders, each manifest, dates of what is left over.

    Args:
        store: The run root.
        rules: What may go.
        now_s: Seconds since 1970, by this machine's clock, as pins have it; ages are told by the store's.

    Raises:
        ConfigError: What was typed ranks by a metric that no checkpoint has.
        NoSuchStepError: A step that was named is not committed.
        RemovalRefusedError: It must not go.
        StoreError: The run root could not be listed.
    """
    return _Look(store, rules, now_s).everything()


class _Look:
    def __init__(self, store: Store, rules: Rules, now_s: float) -> None:
        self._store, self._rules, self._now_s = store, rules, now_s
        probe = f"{keys.PROBES}clock-{secrets.token_hex(8)}"
        ahead_s = storeclock.assumed_ahead_s(store, probe) if rules.older_than_s else 0.0
        self._limit_s = now_s + ahead_s - rules.older_than_s
        notes = SideFiles(store, readers=at_once(store))
        self._seen = {one.checkpoint.key: one for one in discover.look(store, notes, at_once=at_once(store))}
        self._committed = discover.committed(store)
        self._newest = max((attempt.step for attempt in self._committed), default=-1)
        self._pins = notes.pins(now_s)
        named = [one for one in self._committed if one.step in rules.steps]
        self._named = [one for one in named if rules.attempt in {None, one.attempt}]
        rest = [seen for attempt, seen in self._seen.items() if attempt not in self._named]
        self._plan = keeping.plan(store, rest, notes, rules.keep, now_s=now_s)
        self._marked = set(deletions.condemned(store))
        self._spared: dict[str, str] = {}

    def everything(self) -> Leftovers:
        self._rules.check_metrics([seen.checkpoint.metrics for seen in self._seen.values() if seen.counts])
        self._check_named()
        going = {**self._plan.remove, **dict.fromkeys(self._named, "asked for")}
        doomed = [self._doomed(one, CHECKPOINT, why) for one, why in going.items()]
        doomed += [self._doomed(one, DAMAGED, why) for one, why in self._damaged()]
        doomed += [self._doomed(one, ATTEMPT, why) for one, why in self._attempts()]
        gone = {one.attempt for one in doomed}
        self._check_last(gone)
        users = self._users(gone)
        try:
            unfinished, remarks = self._store.remove_unfinished(self._limit_s, dry_run=True), self._plan.remarks
        except StoreError as err:  # on S3 it takes a right of its own
            unfinished, remarks = 0, (*self._plan.remarks, f"unfinished uploads cannot be seen: {err}")
        return Leftovers(
            policy=self._plan.policy,
            keep={one: why for one, why in sorted(self._plan.keep.items()) if one not in gone},
            doomed=tuple(sorted(doomed, key=lambda one: (one.attempt.step, one.attempt.epoch))),
            loose=tuple(self._loose(gone, users)),
            unfinished=unfinished,
            limit_s=self._limit_s,
            spared=self._spared,
            remarks=remarks,
            users=users,
            sizes={str(one): seen.checkpoint.nbytes for one, seen in self._seen.items() if one not in gone},
        )

    def _check_named(self) -> None:
        steps = tuple(sorted({attempt.step for attempt in self._committed}))
        for step in self._rules.steps:
            if step not in steps:
                deletions.check_step(self._store, step)
                raise NoSuchStepError(self._store.url, step, steps)
        if self._rules.attempt is not None and not self._named:
            step = self._rules.steps[0]
            there = tuple(one.attempt for one in self._committed if one.step == step)
            reason = f"has no committed attempt {self._rules.attempt}"
            raise NoSuchStepError(self._store.url, step, steps, reason, there)
        for attempt in self._named:
            if pins := self._pins.get(attempt):
                reason = f"is held ({', '.join(pins)}); first: dcpsvc unpin"
                raise RemovalRefusedError(self._store.url, attempt.step, reason)
            for other in self._plan.keep:
                if (manifest := self._seen[other].manifest) and attempt in keeping.needs(manifest):
                    raise RemovalRefusedError(self._store.url, attempt.step, f"holds files of step {other.step}")

    def _doomed(self, attempt: Attempt, kind: str, why: str) -> Doomed:
        seen = self._seen.get(attempt)
        return Doomed(attempt, kind, why, 0 if seen is None else seen.checkpoint.nbytes)

    def _damaged(self) -> Iterable[tuple[Attempt, str]]:
        """Commits that no resume can take. Their files may be another one's."""
        needed = {one for seen in self._seen.values() if seen.manifest for one in keeping.needs(seen.manifest)}
        for attempt in self._committed:
            if (seen := self._seen.get(attempt)) is None or seen.counts or attempt in self._named:
                continue
            if self._rules.damaged and attempt not in needed and attempt not in self._pins:
                yield attempt, seen.checkpoint.reason
            else:
                self._spared[str(attempt)] = f"damaged, and goes only with --damaged: {seen.checkpoint.reason}"

    def _attempts(self) -> Iterable[tuple[Attempt, str]]:
        """What is no checkpoint and never will be."""
        for attempt in sorted({*retain.debris(self._store, _ANY_EPOCH, self._committed), *self._lone_marks()}):
            if str(attempt) in self._spared:
                continue  # it has a manifest
            if attempt in self._rules.waiting:
                self._spared[str(attempt)] = "the next start on this node finishes its upload"
            elif (attempt in self._marked and attempt.step <= self._newest) or self._is_old(self._keys_of(attempt)):
                seen = self._seen.get(attempt)
                yield attempt, "only notes are left of it" if seen is None else seen.checkpoint.reason
            else:
                self._spared[str(attempt)] = (
                    "too young: it may be on its way, or be finished from the disks of its nodes"
                )

    def _lone_marks(self) -> list[Attempt]:
        """Of attempts of which nothing else is there."""
        return [one for one in self._marked if one not in self._committed and one not in self._seen]

    def _keys_of(self, attempt: Attempt) -> list[str]:
        prefixes = (attempt.data, attempt.metrics, attempt.pins)
        found = [entry.key for prefix in prefixes for entry in self._store.list(prefix)]
        return [*found, *([attempt.tombstone] if attempt in self._marked else []), attempt.manifest]

    def _is_old(self, found: Collection[str]) -> bool:
        """Whether all of it is older than it must be; what has no date is not."""
        if not self._rules.older_than_s:
            return True
        return all(date <= self._limit_s for date in each(self._date, list(found), at_once(self._store)))

    def _date(self, key: str) -> float:
        try:
            date = written_s(self._store, key)
        except StoreNotFoundError:
            return 0.0
        return math.inf if date is None else date

    def _check_last(self, gone: set[Attempt]) -> None:
        whole = [attempt for attempt in self._committed if (seen := self._seen.get(attempt)) and seen.counts]
        candidates = whole or self._committed
        if self._rules.force_last or not candidates:
            return
        last = candidates[-1]
        if last in gone and (whole or gone.issuperset(self._committed)):
            reason = "is the newest checkpoint" if whole else "is the last commit there is"
            raise RemovalRefusedError(self._store.url, last.step, f"{reason}; to delete it all the same: --force-last")

    def _users(self, gone: set[Attempt]) -> dict[str, frozenset[Attempt]]:
        users: dict[str, set[Attempt]] = {}
        for attempt, seen in self._seen.items():
            if seen.manifest is not None and attempt in gone:
                users.setdefault(seen.manifest.layout.path, set()).add(attempt)
        return {path: frozenset(attempts) for path, attempts in users.items()}

    def _loose(self, gone: set[Attempt], users: Mapping[str, Collection[Attempt]]) -> Iterable[Loose]:
        staying = [seen for attempt, seen in self._seen.items() if attempt not in gone]
        yield from self._layouts(staying, users)
        yield from self._orphans(staying)
        yield from self._small(gone)

    def _layouts(self, staying: Collection[Seen], users: Mapping[str, Collection[Attempt]]) -> Iterable[Loose]:
        if any(seen.manifest is None and seen.checkpoint.key in self._committed for seen in staying):
            return  # nobody knows which layout a damaged manifest means
        named = {seen.manifest.layout.path for seen in staying if seen.manifest is not None}
        for entry in self._store.list(keys.LAYOUTS):
            if keys.is_layout(entry.key) and entry.key not in named and self._is_old([entry.key]):
                why = "only checkpoints that go name it" if entry.key in users else "no manifest names it"
                yield Loose(entry.key, LAYOUT, why, entry.nbytes)

    def _orphans(self, staying: Collection[Seen]) -> Iterable[Loose]:
        """Files of ours in the folder of a checkpoint that no manifest names."""
        whole = {seen.checkpoint.key for seen in staying if seen.manifest is not None}
        named = {path for seen in staying if seen.manifest is not None for path in seen.manifest.sizes}
        for entry in self._store.list(keys.DATA):
            if keys.writer_of(entry.key) is None or entry.key in named:
                continue
            if keys.attempt_below(entry.key) in whole:
                yield from self._if_old(entry, ORPHAN, "no manifest names it")
        for entry in self._store.list(keys.LINEAGE):
            attempt = keys.lineage_of(entry.key)
            if attempt is not None and attempt not in self._seen:
                yield from self._if_old(entry, ORPHAN, "its checkpoint is gone")

    def _small(self, gone: set[Attempt]) -> Iterable[Loose]:
        for attempt in sorted(self._marked - gone):
            if attempt in self._committed:
                yield Loose(attempt.tombstone, TOMBSTONE, "a deletion that broke off before it began", 0)
        for entry in self._store.list(keys.PINS):
            named = keys.pin_of(entry.key)
            if named and named[1] is not None and named[0] not in gone and self._now_s >= named[1] + CLOCK_SLACK_S:
                yield Loose(entry.key, LEASE, "it has ended", entry.nbytes)
        for entry in self._store.list(keys.PROBES):
            yield from self._if_old(entry, PROBE, "whoever probed is gone")

    def _if_old(self, entry: Entry, kind: str, why: str) -> Iterable[Loose]:
        if self._is_old([entry.key]):
            yield Loose(entry.key, kind, why, entry.nbytes)
