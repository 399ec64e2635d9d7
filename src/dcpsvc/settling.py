"""Taking a run root over: claim it, finish uploads that were cut short, write down what is inherited, sweep.

Needs ranks and stores, nothing else: no local paths, no torch. Collective; the coordinator decides, all hear the same.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dcpsvc import fence
from dcpsvc.errors import StoreError
from dcpsvc.format import keys
from dcpsvc.format.epochs import Claim
from dcpsvc.format.keys import Attempt, Epoch
from dcpsvc.ranks.rendezvous import DisagreementError
from dcpsvc.recovery import Recovery, holdings
from dcpsvc.stages import discover, retain
from dcpsvc.tiers import Tiers

if TYPE_CHECKING:
    from dcpsvc.ranks.job import Job
    from dcpsvc.ranks.rendezvous import Meeting

logger = logging.getLogger("dcpsvc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What all ranks start from.

    Attributes:
        epoch: This job's; names its attempts.
        committed: Attempts that count, ascending.
        recovered: Those of them whose upload this start has finished.
    """

    epoch: Epoch
    committed: tuple[Attempt, ...]
    recovered: tuple[Attempt, ...]


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
    stock = job.meet("open/claim", holdings(tiers), lambda held: _claim(job, tiers, held), meeting)
    epoch = Epoch(*stock["epoch"])
    recovered = _recover(job, tiers, epoch, stock, meeting)
    verdict = job.meet("open/inherit", None, lambda _: _inherit(tiers, epoch, recovered), meeting)
    committed = tuple(Attempt(*pair) for pair in verdict)
    _sweep(job, tiers, committed, [Attempt(*pair) for pair in stock["dead"]])
    return Settled(epoch=epoch, committed=committed, recovered=tuple(recovered))


def _claim(job: Job, tiers: Tiers, held: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Coordinator: own the root, finish deletions, see what is committed and what could be."""

    def claim(number: int) -> Claim:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return Claim(epoch=Epoch(number, job.incarnation), host=socket.gethostname(), pid=os.getpid(), created=now)

    epoch = fence.claim(tiers.remote, claim).epoch
    removed = retain.finish_removals(tiers.remote)
    committed = discover.committed(tiers.remote)
    held_attempts = {Attempt(*one["attempt"]) for holding in held for one in holding}
    dead = {one for one in held_attempts - set(committed) if one.epoch < epoch}
    newest = max((attempt.step for attempt in committed), default=-1)
    candidates = [one for one in dead if one.step > newest and one not in removed]
    return {
        "epoch": list(epoch),
        "dead": [list(attempt) for attempt in sorted(dead)],
        "plans": Recovery.plans(held, sorted(candidates, reverse=True), job.world_size),
    }


def _recover(job: Job, tiers: Tiers, epoch: Epoch, stock: dict[str, Any], meeting: Meeting) -> list[Attempt]:
    """Finish the newest upload that can be finished. What cannot be is debris: the step is trained again."""
    for number, plan in enumerate(stock["plans"]):
        recovery = Recovery(job, tiers, epoch, f"open/recover-{number}", meeting)
        attempt = Attempt(*plan["attempt"])
        try:
            recovery.run(plan)
        except DisagreementError as err:
            if err.missing:
                raise
            reason = "; ".join(map(str, err.failures))
            logger.log(_loud(job), "the upload of step %s (%s) is not finished: %s", attempt.step, attempt, reason)
        else:
            return [attempt]
    return []


def _inherit(tiers: Tiers, epoch: Epoch, recovered: list[Attempt]) -> list[list[Any]]:
    """Coordinator: from here on nothing else that older jobs write counts."""
    found = discover.committed(tiers.remote)
    if recovered:  # of an epoch whose other attempts may not count any more
        found = sorted({*found, *recovered}, key=lambda one: (one.step, one.epoch.number, one.attempt))
    fence.inherit(tiers.remote, epoch, found)
    return [list(attempt) for attempt in found]


def _sweep(job: Job, tiers: Tiers, committed: tuple[Attempt, ...], dead: list[Attempt]) -> None:
    """Remove what dead attempts left here: each rank its own disk, the coordinator the run root.

    Debris is invisible, so what cannot be removed now must not stop this rank while the others go on.
    """
    try:
        for entry in tiers.local.list(keys.DATA):
            attempt = keys.attempt_of(entry.key)
            if attempt is not None and attempt not in committed and entry.key == attempt.shard(job.rank):
                retain.remove_local(tiers.local, attempt, job.rank)
        for (
            attempt
        ) in dead:  # nobody can commit these: whoever comes first removes the shards of ranks that are no more
            if attempt not in committed:
                retain.remove_data(tiers.local, attempt)
                tiers.local.delete(attempt.manifest)
                if job.coordinates:
                    retain.remove_data(tiers.remote, attempt)
    except StoreError as err:
        logger.warning("debris of an earlier job stays: %s", err)


def _loud(job: Job) -> int:
    return logging.WARNING if job.coordinates else logging.DEBUG
