"""Beginning a save, on the training thread: collect references, copy this rank's share, hand over to DCP."""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from dcpsvc.errors import RankFailure, StateError
from dcpsvc.events import Point
from dcpsvc.pending import PendingSave
from dcpsvc.save import Save, meeting_place
from dcpsvc.stages import ack, shard
from dcpsvc.stages.stage import Arena, ArenaStager, Snapshot
from dcpsvc.state import claims, division

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcpsvc.events import Events
    from dcpsvc.format.keys import Attempt
    from dcpsvc.life import Life
    from dcpsvc.ranks.job import Job
    from dcpsvc.save import Shard
    from dcpsvc.settling import OpenRun
    from dcpsvc.state.app import AppState
    from dcpsvc.state.collected import Collected


logger = logging.getLogger("dcpsvc")


class Saver:
    """Makes snapshots; owns the arena. The save before must have ended when the next begins."""

    def __init__(self, job: Job, run: OpenRun, state: AppState, life: Life, events: Events) -> None:
        self._job, self._run, self._state, self._life, self._events = job, run, state, life, events
        self._arena = Arena()
        self._tries: dict[int, int] = {}
        self._last_shard: Shard | None = None

    def accept(self, step: int, began: float) -> Save:
        """A new attempt at a step, named alike by all ranks that come to it.

        An attempt at which the others waited for this rank in vain is passed over: they count it, so it does too.
        """
        attempt = self._name(step)
        with contextlib.suppress(RuntimeError):  # the ranks' store is gone: the save will say so, not the training step
            while self._job.rendezvous.was_missed(f"{meeting_place(attempt)}/plan"):
                attempt = self._name(step)
        self._events.emit(Point.SAVE_ACCEPTED, step=step, attempt=attempt.attempt)
        nothing_yet = RankFailure(self._job.rank, "stage", "Unfinished", "staging did not finish")
        return Save(key=attempt, pending=PendingSave(*attempt), began=began, proposal=nothing_yet)

    def _name(self, step: int) -> Attempt:
        number = self._tries.get(step, 0)
        self._tries[step] = number + 1
        return self._run.settled.epoch.attempt(step, number)

    def stage(self, save: Save, metrics: Mapping[str, float], values: Collected | None) -> None:
        """Copy this rank's share; DCP's thread then waits at the gate. A failure becomes the save's own.

        Args:
            save: As :meth:`accept` made it.
            metrics: For the manifest.
            values: Kept from an earlier moment; None takes those of now.

        Raises:
            StateError: Something cannot be saved. The other ranks hear of it through the save.
        """
        try:
            self._stage(save, metrics, values)
        except StateError as err:
            save.proposal = RankFailure(self._job.rank, "stage", type(err).__name__, str(err))
            raise
        except Exception as err:  # noqa: BLE001 - a failed save never breaks the training step; the save reports it
            save.proposal = RankFailure(self._job.rank, "stage", type(err).__name__, str(err) or "no message")

    def _stage(self, save: Save, metrics: Mapping[str, float], values: Collected | None) -> None:
        began = time.perf_counter()
        rank, world_size = self._job.rank, self._job.world_size
        collected = self._state.collect(rank, values=values)
        said = claims.claims(collected, verify_replicas=world_size > 1)
        shares = division.shares(collected, rank, world_size)
        documents = (collected.documents if self._job.coordinates else {}) | collected.own_documents
        about = {"step": str(save.key.step), "attempt": save.key.attempt, "rank": str(rank)}
        if self._last_shard is not None and not self._last_shard.ended:
            self._arena = Arena()  # the disk hangs on the last one
        snapshot = Snapshot(self._arena, shares, documents, about)
        self._begin_shard(save, snapshot)
        part = ack.part(snapshot.placement, rank, collected.aliases)
        save.proposal = ack.Proposal(
            step=save.key.step,
            said=said,
            part=part,
            known_layout=self._life.known_layout(part),
            stamp=_stamp(metrics),
        )
        save.pending.timings.stage_s = time.perf_counter() - began
        save.pending.resolve(save.pending.staged)
        self._events.emit(Point.STAGED, step=save.key.step, attempt=save.key.attempt, nbytes=len(snapshot.image))

    def _begin_shard(self, save: Save, snapshot: Snapshot) -> None:
        key = save.key.shard(self._job.rank)
        self._last_shard = save.shard = shard.begin(
            snapshot.tensors,
            stager=ArenaStager(snapshot),
            placement=snapshot.placement,
            writer=shard.ShardWriter(self._run.local_path / key, snapshot.image, rank=self._job.rank, key=key),
            process_group=self._job.dcp_group,
        )


def _stamp(metrics: Mapping[str, float]) -> dict[str, Any]:
    """What the coordinator says about a checkpoint, the same in every copy of its manifest."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            numbers[str(name).encode(errors="replace").decode()] = float(value)
        except Exception:  # noqa: BLE001 - a metric never costs a checkpoint, whatever it is
            logger.warning("metric %s is not recorded: %s is not a number", name, type(value).__name__)
    return {
        "created": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "metrics": {name: value if value - value == 0 else str(value) for name, value in numbers.items()},
        "versions": {
            "dcpsvc": metadata.version("dcpsvc"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }
