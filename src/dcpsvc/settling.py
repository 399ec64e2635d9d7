"""Taking a run root over: claim it, finish uploads that were cut short, write down what is inherited, sweep.

Needs ranks and stores, nothing else: no local paths, no torch. Collective; the coordinator decides, all hear the same.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from dcpsvc import deletions, fence
from dcpsvc.errors import (
    CorruptShardError,
    LayoutError,
    ManifestError,
    RankFailure,
    RunBusyError,
    StoreError,
    StoreNotFoundError,
)
from dcpsvc.format.epochs import Claim
from dcpsvc.format.keys import NO_EPOCH, Attempt, Epoch
from dcpsvc.ranks.rendezvous import DisagreementError
from dcpsvc.recovery import Recovery, holdings, plans
from dcpsvc.stages import discover, retain
from dcpsvc.tiers import Tiers

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.ranks.job import Job
    from dcpsvc.ranks.rendezvous import Meeting
    from dcpsvc.storage.base import Store

logger = logging.getLogger("dcpsvc")

T = TypeVar("T")

_FOR_GOOD = frozenset(
    kind.__name__ for kind in (CorruptShardError, LayoutError, ManifestError, StoreError, StoreNotFoundError)
)
"""What no further try can mend: damage, a file that is gone, an attempt that is being deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What all ranks start from.

    Attributes:
        epoch: This job's; names its attempts.
        committed: Attempts that count, ascending.
        recovered: Those of them whose upload this start has finished.
        unfinished: Uploads that could not be finished for a reason that may pass: the next start tries again, unless
            a commit has passed them.
        deleted: Whose deletion this start has finished: old checkpoints, and what failed saves had left.
    """

    epoch: Epoch
    committed: tuple[Attempt, ...]
    recovered: tuple[Attempt, ...]
    unfinished: tuple[Attempt, ...]
    deleted: tuple[Attempt, ...] = ()


@dataclass(slots=True, kw_only=True)
class OpenRun(Tiers):
    """One rank's hold on a run that its job owns."""

    settled: Settled


def settle(job: Job, tiers: Tiers, meeting: Meeting) -> Settled:
    """Become the owner of the run root. Every rank, before the first step.

    Args:
        job: The ranks.
        tiers: Where to.
        meeting: How long a rank may take: an upload may be part of it.

    Raises:
        DisagreementError: The run root cannot be claimed, or ranks are missing; the same on every rank.
    """

    def within(work: Callable[[], T]) -> T:
        return job.rendezvous.clock.bounded(work, meeting.timeout_s, "a call to the store")

    try:
        mine: Any = holdings(tiers)
    except Exception as err:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        mine = RankFailure(job.rank, "open", type(err).__name__, str(err))
    stock = job.meet("open/claim", mine, lambda held: within(lambda: _claim(job, tiers, held)), meeting)
    epoch = Epoch(*stock["epoch"])
    recovered, unfinished = _recover(job, tiers, epoch, stock["plans"], meeting)
    verdict = job.meet("open/inherit", None, lambda _: within(lambda: _inherit(tiers, epoch, recovered)), meeting)
    committed = tuple(Attempt(*pair) for pair in verdict)
    unfinished = [one for one in unfinished if one not in committed]  # its manifest stood, and could not be read back
    dead = [Attempt(*pair) for pair in stock["dead"] if Attempt(*pair) not in {*committed, *unfinished}]
    try:
        _sweep_local(job, tiers, dead)
    except StoreError as err:  # debris is invisible; it must not stop this rank while the others go on
        logger.warning("debris of an earlier job stays: %s", err)
    deleted = tuple(Attempt(*pair) for pair in stock["deleted"])
    return Settled(
        epoch=epoch, committed=committed, recovered=tuple(recovered), unfinished=tuple(unfinished), deleted=deleted
    )


def _claim(job: Job, tiers: Tiers, held: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Coordinator: own the root, finish deletions, see what is committed and what could be."""

    def claim(number: int) -> Claim:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return Claim(epoch=Epoch(number, job.incarnation), host=socket.gethostname(), pid=os.getpid(), created=now)

    epoch = fence.claim(tiers.remote, claim).epoch
    marked = deletions.condemned(tiers.remote)
    committed = discover.committed(tiers.remote)
    newest = max((attempt.step for attempt in committed), default=-1)
    deleted = _finish_removals(tiers.remote, marked, committed, newest)
    held_attempts = {Attempt(*one["attempt"]) for holding in held for one in holding}
    dead = {one for one in held_attempts - set(committed) if one.epoch < epoch}
    latest_epoch = max((attempt.epoch for attempt in committed), default=NO_EPOCH)
    candidates = [one for one in dead - set(marked) if one.step > newest and one.epoch >= latest_epoch]
    newest_first = sorted(candidates, key=lambda one: (one.step, one.epoch), reverse=True)
    return {
        "epoch": list(epoch),
        "dead": [list(attempt) for attempt in sorted(dead)],
        "deleted": [list(attempt) for attempt in deleted],
        "plans": plans(held, newest_first, job.world_size, max(committed, key=lambda one: one.step, default=None)),
    }


def _finish_removals(remote: Store, marked: list[Attempt], committed: list[Attempt], newest: int) -> list[Attempt]:
    """Deletions that broke off before the manifest was gone are decided anew, those after it are finished.

    One of an attempt newer than the newest commit waits for a commit: whoever began it may still be at it. Says which
    had files left: a mark alone is that of a save which failed.
    """
    finished: list[Attempt] = []
    for attempt in marked:
        if attempt in committed:
            remote.delete(attempt.tombstone)
        elif attempt.step <= newest:
            finished += [attempt] if remote.list(attempt.data) else []
            retain.finish_removal(remote, attempt)
    return finished


def _recover(
    job: Job, tiers: Tiers, epoch: Epoch, candidates: list[dict[str, Any]], meeting: Meeting
) -> tuple[list[Attempt], list[Attempt]]:
    """Finish the newest upload that can be finished; and those that might be another time. Damaged ones are debris."""
    unfinished: list[Attempt] = []
    for number, plan in enumerate(candidates):
        recovery = Recovery(job, tiers, epoch, f"open/recover-{number}", meeting)
        attempt = Attempt(*plan["attempt"])
        try:
            recovery.run(plan)
        except DisagreementError as err:
            if err.missing or any(failure.error == RunBusyError.__name__ for failure in err.failures):
                raise
            if not any(failure.error in _FOR_GOOD for failure in err.failures):
                unfinished.append(attempt)
            reason = "; ".join(map(str, err.failures))
            logger.log(_loud(job), "the upload of step %s (%s) is not finished: %s", attempt.step, attempt, reason)
        else:
            return [attempt], unfinished
    return [], unfinished


def _inherit(tiers: Tiers, epoch: Epoch, recovered: list[Attempt]) -> list[list[Any]]:
    """Coordinator: from here on nothing else that older jobs write counts."""
    found = discover.committed(tiers.remote)
    if recovered:  # of an epoch whose other attempts may not count any more
        found = sorted({*found, *recovered}, key=lambda one: (one.step, one.epoch.number, one.attempt))
    fence.inherit(tiers.remote, epoch, found)
    if theirs := fence.successor(tiers.remote, epoch):
        raise RunBusyError(tiers.remote.url, f"{theirs} has just taken it over")
    return [list(attempt) for attempt in found]


def _sweep_local(job: Job, tiers: Tiers, dead: list[Attempt]) -> None:
    """Remove what dead attempts left on this disk; at the run root they go with the first commit.

    Nobody can commit them any more: whoever comes first removes the shards of ranks that are no more.
    """
    for attempt in dead:
        retain.remove_local(tiers.local, attempt, job.rank)
        retain.remove_data(tiers.local, attempt)


def _loud(job: Job) -> int:
    return logging.WARNING if job.coordinates else logging.DEBUG
