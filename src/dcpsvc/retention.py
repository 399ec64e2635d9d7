"""Retention in a job, after each commit: one decision for all ranks, carried out on both tiers.

What stays is said by :mod:`dcpsvc.policies` and :mod:`dcpsvc.decision`; deleting is :mod:`dcpsvc.stages.retain`. Where
no job lives: ``dcpsvc gc`` (:mod:`dcpsvc.tools.clearing`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from typing import TYPE_CHECKING, Any, TypeVar

from dcpsvc import deletions, fence, keeping, preflight, sidefiles
from dcpsvc.decision import decide
from dcpsvc.errors import FormatError, RankFailure, StoreError
from dcpsvc.events import Point
from dcpsvc.format.keys import Attempt
from dcpsvc.policies import Everything
from dcpsvc.ranks.rendezvous import DisagreementError, Meeting
from dcpsvc.sidefiles import SideFiles
from dcpsvc.stages import discover, retain
from dcpsvc.stages.retain import Rate, Removal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dcpsvc.catalog import Catalog
    from dcpsvc.commits import Commit
    from dcpsvc.config import Options
    from dcpsvc.events import Events
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.policies import Keep
    from dcpsvc.preflight import DiskNeed
    from dcpsvc.ranks.job import Job
    from dcpsvc.save import Save
    from dcpsvc.settling import OpenRun

T = TypeVar("T")

logger = logging.getLogger("dcpsvc")

_SHARE = 0.25
"""Of the time a shard may take to reach the run root: so long the deletions after a commit may take."""

_LISTED = 10


class Retention:
    """Runs on the uploader thread, after each commit."""

    def __init__(self, job: Job, run: OpenRun, options: Options, events: Events, catalog: Catalog) -> None:
        self._job, self._run, self._options, self._events, self._catalog = job, run, options, events, catalog
        self._work = Meeting(options.upload_timeout_s, silence_s=options.sync_timeout_s)
        self._notes = SideFiles(run.remote)
        self._pace = Rate(options.deletes_per_s, job.rendezvous.clock)
        self._remarked: set[Keep] = set()
        self._has_looked = False

    def run(self, save: Save) -> None:
        """Delete what the policy lets go and what is no checkpoint, then trim the local tier. The commit stands."""
        self._pace.begin(self._options.upload_timeout_s * _SHARE)
        self._clear(save)
        if isinstance(self._options.keep, Everything):
            self._job.await_coordinator(f"{save.place}/clear", self._work)
        else:
            self._apply_policy(save)
        self._trim_local(save)

    def discard(self, attempt: Attempt, *, uploading: bool = True) -> None:
        """Delete what an attempt of this job left: each rank on its own disk, the coordinator at the run root.

        What cannot be deleted is debris, never a checkpoint, and goes with a later commit.

        Args:
            attempt: It failed.
            uploading: It had come so far that something may be at the run root.
        """
        with contextlib.suppress(StoreError):
            retain.remove_local(self._run.local, attempt, self._job.rank)
        if self._job.coordinates and uploading:
            with contextlib.suppress(Exception):
                self._within(functools.partial(self._empty, attempt))

    def make_room(self, need: DiskNeed | None) -> Any:
        """The local disk is too small for what the ranks would write: let go what is whole at the run root.

        The newest checkpoint stays. Never raises.
        """
        if need is None:
            return None
        uploaded = set(self._catalog.attempts.values())
        newest = sorted(uploaded, key=lambda one: (one.step, one.epoch))[-1:]
        rank, world_size = self._job.rank, self._job.world_size
        try:
            freed = preflight.free_up(self._run.local, rank=rank, world_size=world_size, uploaded=uploaded, keep=newest)
        except StoreError as err:
            return RankFailure(rank, "plan", type(err).__name__, str(err))
        logger.info("rank %s: removed %s of the local tier", rank, preflight.mebibytes(freed))
        return need.again().to_json()

    def _empty(self, attempt: Attempt) -> None:
        """The mark stays until a later commit: until then a newer job might want to finish the attempt."""
        if retain.condemn(self._run.remote, attempt, self._is_owner):
            self._run.remote.delete(attempt.manifest)  # a store that cuts or damages may have left one
            retain.remove_data(self._run.remote, attempt)

    def _is_owner(self) -> bool:
        return not fence.successor(self._run.remote, self._run.settled.epoch)

    def _within(self, work: Callable[[], T]) -> T:
        clock = self._job.rendezvous.clock
        return clock.bounded(work, self._options.upload_timeout_s, "a call to the store")

    def _clear(self, save: Save) -> None:
        """Attempts up to the step that was just committed: whoever claims from now on has no use for them."""
        try:
            for attempt in self._debris(save.key.step):
                retain.remove_local(self._run.local, attempt, self._job.rank)
                if attempt.epoch < self._run.settled.epoch:  # it may have had more ranks than there are now
                    retain.remove_data(self._run.local, attempt)
                if not self._job.coordinates or self._within(
                    functools.partial(retain.finish_removal, self._run.remote, attempt, self._pace)
                ):
                    self._catalog.leftovers.discard(attempt)
        except Exception as err:  # noqa: BLE001 - debris is invisible; the next commit tries again
            self._emit(save, detail=f"debris stays: {err}", level=logging.WARNING)

    def _debris(self, step: int) -> list[Attempt]:
        """Of this job, and, looked for once, of earlier ones, from whatever disk."""
        settled = self._run.settled
        if self._job.coordinates and not self._has_looked:
            self._remove_unfinished()
            look = functools.partial(retain.debris, self._run.remote, settled.epoch, settled.committed)
            self._catalog.leftovers |= set(self._within(look))
            self._within(functools.partial(keeping.record_policy, self._run.remote, settled.epoch, self._options.keep))
            self._has_looked = True
        if self._job.coordinates and self._catalog.manifests is None:
            self._catalog.leftovers |= self._within(self._cut_short)
        return sorted(attempt for attempt in self._catalog.leftovers if attempt.step <= step)

    def _remove_unfinished(self) -> None:
        """What dead writers left half sent. To see it takes a right of its own on S3, which nothing else depends on."""
        try:
            self._within(functools.partial(self._run.remote.remove_unfinished, self._run.settled.epoch.claim))
        except (StoreError, TimeoutError) as err:
            logger.warning("uploads that dead jobs left unfinished stay at the run root: %s", err)

    def _cut_short(self) -> set[Attempt]:
        """Deletions that broke off when the manifest was gone."""
        marked, committed = deletions.condemned(self._run.remote), discover.committed(self._run.remote)
        return {one for one in marked if one.epoch <= self._run.settled.epoch}.difference(committed)

    def _apply_policy(self, save: Save) -> None:
        try:
            removed = self._job.meet(f"{save.place}/retain", None, lambda _: self._expire(), self._work)
            for attempt in (Attempt(*pair) for pair, _ in removed):
                self._catalog.drop(attempt)
                retain.remove_local(self._run.local, attempt, self._job.rank)
        except Exception as err:  # noqa: BLE001 - whatever it is, the commit stands and the next one tries again
            self._catalog.manifests = None  # what of it was deleted must not count any more: read anew
            self._emit(save, detail=f"incomplete: {_told(err)}", level=logging.WARNING)
        else:
            level = logging.INFO if removed and self._job.coordinates else None
            self._emit(save, detail=f"removed {_listed(removed)}" if removed else "removed nothing", level=level)

    def _trim_local(self, save: Save) -> None:
        """The local tier is a cache of the newest commits: it must not fill the disk."""
        try:
            retain.trim_local(
                self._run.local,
                rank=self._job.rank,
                world_size=self._job.world_size,
                keep=self._options.keep_local,
                newest=save.key,
            )
        except Exception as err:  # noqa: BLE001 - a cache that could not be trimmed fails nothing
            self._emit(save, detail=f"local tier not trimmed: {err}", level=logging.WARNING)

    def _expire(self) -> list[tuple[Attempt, str]]:
        """Coordinator: decide, delete from the run root, say what and why. Damaged commits neither count nor go."""
        if self._catalog.manifests is None:
            self._catalog.manifests = self._within(self._valid_commits)
        self._catalog.late.clear()  # they are durable, so the look finds them
        self._within(self._notes.look)
        commits = keeping.commits_of(self._catalog.manifests, self._notes, time.time())
        self._remark(commits)
        decision = decide(self._options.keep, commits, protected=self._catalog.in_use)
        removed: list[tuple[Attempt, str]] = []
        for attempt, why in ((key, why) for key, why in decision.remove.items() if isinstance(key, Attempt)):
            outcome = self._remove(attempt) if self._pace.more() else Removal.LATER
            if outcome in {Removal.NOT_OURS, Removal.LATER}:
                break
            if outcome is not Removal.HELD:
                removed.append((attempt, why))
        gone = dict(removed)
        self._catalog.commits = tuple(commit for commit in commits if commit.key not in gone)
        return removed

    def _remove(self, attempt: Attempt) -> Removal:
        held = functools.partial(sidefiles.is_pinned, self._run.remote, attempt, time.time())
        remove = functools.partial(retain.remove, self._run.remote, attempt, self._is_owner, held=held, pace=self._pace)
        outcome = self._within(remove)
        if outcome is Removal.BEGUN:
            self._catalog.leftovers.add(attempt)
        return outcome

    def _remark(self, commits: Sequence[Commit]) -> None:
        """Once for each rule: what is odd about it is odd at every commit."""
        for rule, text in self._options.keep.remarks(commits).items():
            if rule not in self._remarked:
                self._remarked.add(rule)
                logger.warning("%s", text)

    def _valid_commits(self) -> list[Manifest]:
        """Read anew."""
        found: list[Manifest] = []
        for attempt in discover.committed(self._run.remote):
            with contextlib.suppress(FormatError, StoreError):  # a damaged commit is for `verify`, not for retention
                if attempt not in self._catalog.aside:
                    found.append(discover.valid(self._run.remote, attempt))
        return found

    def _emit(self, save: Save, *, detail: str, level: int | None = None) -> None:
        self._events.emit(Point.RETAINED, step=save.key.step, attempt=save.key.attempt, detail=detail, level=level)


def _told(err: Exception) -> str:
    if isinstance(err, DisagreementError):
        return "; ".join(map(str, err.failures)) or f"ranks {err.missing} did not come"
    return str(err)


def _listed(removed: Sequence[Sequence[Any]]) -> str:
    """For a log line: as many as one can read."""
    told = [f"step {pair[0]}: {why}" for pair, why in removed[:_LISTED]]
    more = [f"and {len(removed) - _LISTED} more"] if len(removed) > _LISTED else []
    return "; ".join([*told, *more])
