"""Finishing an upload that was cut short: the local tier's manifests are the journal.

A manifest lies on a local tier exactly if every rank's shard was durable on its node. So a job that finds one newer
than the newest commit carries the shards that are not at the run root yet, under the same attempt, and commits.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

from dcpsvc import deletions, fence
from dcpsvc.errors import (
    CorruptShardError,
    FormatError,
    RankFailure,
    RunBusyError,
    StoreError,
    StoreNotFoundError,
    StoreUnavailableError,
)
from dcpsvc.format import keys
from dcpsvc.format import manifest as manifests
from dcpsvc.format.digest import digest
from dcpsvc.format.keys import Attempt
from dcpsvc.format.manifest import LayoutRef
from dcpsvc.ranks.rendezvous import RefusalError
from dcpsvc.stages import commit, discover, upload
from dcpsvc.storage import wholefile
from dcpsvc.storage.base import copies

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dcpsvc.format.keys import Epoch
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.ranks.job import Job
    from dcpsvc.ranks.rendezvous import Meeting
    from dcpsvc.tiers import Tiers

T = TypeVar("T")

_OF_A_MEETING = 0.9
"""A rank that is too slow says so before the others take it for missing."""


def known_shard(tiers: Tiers, attempt: Attempt, rank: int) -> upload.Known | None:
    """A rank's shard of a checkpoint, to compare the next one with; None if that is no use, or nobody can say."""
    if not copies(tiers.remote):
        return None
    for store in (tiers.local, tiers.remote):
        with contextlib.suppress(FormatError, StoreError):
            shards = discover.read_manifest(store, attempt).shards
            return upload.Known(shards[rank], [tiers.local]) if rank < len(shards) else None
    return None


def holdings(tiers: Tiers) -> list[dict[str, Any]]:
    """What this rank sees on its local tier: attempts, the shards of each, and their world size if it is complete."""
    shards: dict[Attempt, list[int]] = {}
    for entry in tiers.local.list(keys.DATA):
        attempt, rank = keys.attempt_of(entry.key), keys.rank_of(entry.key)
        if attempt is not None and rank is not None:
            shards.setdefault(attempt, []).append(rank)
    journal = _journal(tiers)
    attempts = {*shards, *journal}
    return [
        {"attempt": list(one), "shards": shards.get(one, []), "world_size": journal.get(one, 0)}
        for one in sorted(attempts)
    ]


def _journal(tiers: Tiers) -> dict[Attempt, int]:
    """Attempts with a manifest on this disk, and their world size."""
    found: dict[Attempt, int] = {}
    for entry in tiers.local.list(keys.MANIFESTS):
        attempt = keys.attempt_of(entry.key)
        if attempt is None:
            continue
        try:
            manifest = discover.read_manifest(tiers.local, attempt)
        except FormatError:  # a torn journal entry is no journal entry
            continue
        if manifest.run_id == tiers.run_id:
            found[attempt] = manifest.world_size
    return found


def plans(
    held: Sequence[Sequence[dict[str, Any]]],
    candidates: Sequence[Attempt],
    world_size: int,
    newest: Attempt | None = None,
) -> list[dict[str, Any]]:
    """Who carries which shard of each candidate, and the commit it came after. Coordinator; pure.

    A rank carries its own shard if it sees it; the others are spread over those that see them. A shard that lies on no
    disk may be at the run root already: somebody looks.
    """
    made: list[dict[str, Any]] = []
    before = list(newest) if newest else None
    for attempt in candidates:
        mine = [(rank, one) for rank, holding in enumerate(held) for one in holding if one["attempt"] == [*attempt]]
        journals = [(rank, one["world_size"]) for rank, one in mine if one["world_size"]]
        if journals:
            holders: dict[int, list[int]] = {}
            for rank, one in mine:
                for shard in one["shards"]:
                    holders.setdefault(shard, []).append(rank)
            journal, size = journals[0]
            carriers = [_carrier(shard, holders.get(shard, []), world_size) for shard in range(size)]
            made.append({"attempt": list(attempt), "journal": journal, "carriers": carriers, "newest": before})
    return made


def _carrier(shard: int, holders: list[int], world_size: int) -> int:
    if shard in holders:
        return shard
    return holders[shard % len(holders)] if holders else shard % world_size


class Recovery:
    """One attempt's upload, finished by the ranks of another start of the job.

    Args:
        job: The ranks.
        tiers: Both tiers.
        epoch: This job's claim.
        place: Where the ranks meet about it.
        meeting: Deadlines; an upload is part of it.
    """

    def __init__(self, job: Job, tiers: Tiers, epoch: Epoch, place: str, meeting: Meeting) -> None:
        self._job, self._tiers, self._epoch, self._place, self._meeting = job, tiers, epoch, place, meeting

    def run(self, plan: dict[str, Any]) -> None:
        """Carry, prove, commit. Every rank.

        Raises:
            DisagreementError: It cannot be finished, the same on every rank; or ranks are missing.
        """
        attempt = Attempt(*plan["attempt"])
        text = self._then("journal", lambda: self._read(attempt) if plan["journal"] == self._job.rank else None)
        text = self._meet("journal", text, lambda texts: texts[plan["journal"]])
        done = self._then("recover", lambda: self._within(lambda: self._carry(attempt, text, plan)))
        self._meet("carried", done, lambda _: self._within(lambda: self._commit(attempt, text)))

    def _read(self, attempt: Attempt) -> str:
        return self._tiers.local.get(attempt.manifest, max_nbytes=manifests.MAX_NBYTES).decode()

    def _carry(self, attempt: Attempt, text: str, plan: dict[str, Any]) -> None:
        manifest = manifests.loads(attempt.manifest, text.encode())
        for record, carrier in zip(manifest.shards, plan["carriers"], strict=True):
            if record.path != attempt.shard(record.rank):
                raise CorruptShardError(record.path, f"is no shard of {attempt}")
            if carrier == self._job.rank:
                path = self._tiers.local_path / record.path
                known = known_shard(self._tiers, Attempt(*plan["newest"]), record.rank) if plan["newest"] else None
                upload.ensure_shard(self._tiers.remote, record, path, known)
                self._carry_folder(manifest, record.rank)
        if plan["journal"] == self._job.rank:
            self._carry_layout(manifest.layout)

    def _carry_folder(self, manifest: Manifest, rank: int) -> None:
        """It lies beside rank 0's shard, and goes with it."""
        if rank == 0 and manifest.adapter is not None:
            for file in manifest.adapter.files:
                wholefile.ensure(self._tiers.remote, file, self._tiers.local_path / file.path)

    def _carry_layout(self, reference: LayoutRef) -> None:
        """One that went or rotted here may be at the run root all the same: earlier checkpoints had it."""
        local, remote = self._tiers.local, self._tiers.remote
        for store in (local, remote):
            with contextlib.suppress(StoreNotFoundError):
                layout = store.get(reference.path, max_nbytes=reference.nbytes)
                if LayoutRef(digest=digest(layout), nbytes=len(layout)) == reference:
                    upload.put_layout(remote, layout)
                    return
        raise CorruptShardError(reference.path, "neither this disk nor the run root has the manifest's layout")

    def _within(self, work: Callable[[], T]) -> T:
        clock, timeout_s = self._job.rendezvous.clock, self._meeting.timeout_s
        return clock.bounded(work, _OF_A_MEETING * timeout_s, "finishing an upload")

    def _commit(self, attempt: Attempt, text: str) -> None:
        """Coordinator. A tombstone is of a job that was replaced and may be deleting: step back before it counts."""
        remote, manifest = self._tiers.remote, manifests.loads(attempt.manifest, text.encode())
        if theirs := fence.successor(remote, self._epoch):
            raise RefusalError([RankFailure(0, "recover", RunBusyError.__name__, f"replaced by {theirs}")])
        if attempt in deletions.condemned(remote):
            raise RefusalError([RankFailure(0, "recover", StoreError.__name__, f"{attempt} is being deleted")])
        if (unknown := commit.create(remote, manifest)) is not None:
            raise RefusalError([RankFailure(0, "recover", StoreUnavailableError.__name__, unknown)])

    def _then(self, phase: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as err:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            return RankFailure(self._job.rank, phase, type(err).__name__, str(err))

    def _meet(self, where: str, message: Any, decide: Callable[[list[Any]], Any]) -> Any:
        return self._job.meet(f"{self._place}/{where}", message, decide, self._meeting)
