"""Beginning a save, on the training thread: collect references, copy this rank's share, hand over to DCP."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from concurrent.futures import wait
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dcpsvc import preflight
from dcpsvc.blueprint import Blueprints, folder_nbytes
from dcpsvc.errors import RankFailure, StateError
from dcpsvc.events import Point
from dcpsvc.garbage import uncollected
from dcpsvc.outline import Outline
from dcpsvc.pending import PendingSave
from dcpsvc.preflight import DiskNeed, Size
from dcpsvc.save import Save, meeting_place
from dcpsvc.stages import ack, shard
from dcpsvc.stages.stage import Gate
from dcpsvc.staging import Staging
from dcpsvc.state import claims, division
from dcpsvc.state.collected import Collected

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcpsvc.blueprint import Blueprint
    from dcpsvc.config import Options
    from dcpsvc.events import Events
    from dcpsvc.format.keys import Attempt
    from dcpsvc.life import Life
    from dcpsvc.ranks.job import Job
    from dcpsvc.settling import OpenRun
    from dcpsvc.stages.shard import DcpShard
    from dcpsvc.state.app import AppState


logger = logging.getLogger("dcpsvc")

_LOOK_S = 0.2


class Saver:
    """Begins saves.

    Args:
        job: The ranks.
        run: The tiers.
        state: What is saved.
        life: What the saves go on to.
        events: For the observer.
        options: How.
        versions: What every checkpoint says about its origin.
    """

    def __init__(
        self,
        job: Job,
        run: OpenRun,
        state: AppState,
        life: Life,
        events: Events,
        *,
        options: Options,
        versions: Mapping[str, str],
    ) -> None:
        self._job, self._run, self._state, self._life, self._events = job, run, state, life, events
        self._staging = Staging(job, options, self._has_held)
        self._blueprints = Blueprints(job.rank, job.world_size, options.adapter_folder)
        self._tries: dict[int, int] = {}
        self._unwritten: list[tuple[DcpShard, int]] = []
        self._unmade: list[tuple[PendingSave, int]] = []
        self._versions = versions
        self._folder = options.adapter_folder
        self._staged_with = 0
        self._has_said_replanned = self._is_prepared = False

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
        """Copy this rank's share, or begin to, or leave it where it is; DCP's thread then waits at the gate.

        A failure becomes the save's own. The optimizers may step when :meth:`settle` returns.

        Args:
            save: As :meth:`accept` made it.
            metrics: For the manifest.
            values: Kept from an earlier moment; None takes those of now.

        Raises:
            StateError: Something cannot be saved. The other ranks hear of it through the save.
        """
        try:
            with uncollected():
                self._stage(save, metrics, values)
        except StateError as err:
            save.proposal = RankFailure(self._job.rank, "stage", type(err).__name__, str(err))
            raise
        except Exception as err:  # noqa: BLE001 - a failed save never breaks the training step; the save reports it
            save.proposal = RankFailure(self._job.rank, "stage", type(err).__name__, str(err) or "no message")

    def prepare(self, values: Collected | None = None) -> None:
        """Begin what the first save would have to do once: plan, and take and touch its memory. In the background.

        Training thread; reads references, and never raises: a save will say what is wrong.

        Args:
            values: Kept from an earlier moment; None takes those of now.
        """
        try:
            collected = self._state.collect(self._job.rank, values=values and values.copy())
        except Exception as err:  # noqa: BLE001 - see above
            logger.debug("nothing is prepared for the first save: %s", err)
            return
        self._is_prepared = True
        self._staging.arenas.prepare(functools.partial(self._make_ready, collected))

    def prepare_once(self, values: Collected | None = None) -> None:
        """As :meth:`prepare`, unless it was done or a save was staged, or an optimizer has no state yet."""
        if not self._is_prepared and all(optimizer.state for optimizer in self._state.optimizers()):
            self.prepare(values)

    @property
    def held_s(self) -> float:
        """What optimizers waited for copies, all saves together."""
        return self._staging.held_s

    def wait_copied(self) -> None:
        """Until nothing of the state is being read: it is about to be changed. Training thread."""
        self._staging.wait_copied()

    def close(self) -> None:
        """No save is going to be staged any more."""
        self._staging.close()

    def _make_ready(self, collected: Collected) -> None:
        try:
            blueprint = self._blueprints.of(collected)
            blueprint.plan.prepare()
            self._staging.look_for_device(collected)
            self._staging.arenas.make_ready(blueprint.placement)
        except Exception as err:  # noqa: BLE001 - a save will say what is wrong
            logger.debug("nothing is prepared for the first save: %s", err)

    def settle(self, save: Save) -> None:
        """Wait until the optimizers may step: a shard that had no room in memory is written then.

        The uploader must have the save. Bounded by the deadlines of its stages. Whoever is interrupted on the way here
        calls :meth:`let_go`.
        """
        if isinstance(save.proposal, RankFailure):
            return  # nothing of it will be read
        if save.copying is not None:
            save.copying.release(None)
            return
        while not wait([save.pending.staged], _LOOK_S).done:
            pass  # a Ctrl-C that came a moment before the wait is seen only between two waits

    def _has_held(self, save: Save, seconds: float) -> None:
        """An optimizer waited for the copy."""
        save.pending.timings.held_s += seconds
        key = save.key
        self._events.emit(Point.TRAINING_WAITED, step=key.step, attempt=key.attempt, phase="optimizer", seconds=seconds)

    def let_go(self, save: Save) -> None:
        """The state is going to change, whatever has become of the save: what is half written must not see that."""
        if save.shard is not None and not save.pending.staged.done():
            save.shard.refuse(InterruptedError("save() was interrupted"))

    def predicted(self) -> Size | None:
        """What this rank would write for a save now, at least: values aside, and optimizers only if they have begun.

        Reads references; copies and hashes nothing. None if the state cannot be read yet.
        """
        try:
            collected = self._state.collect(self._job.rank, values=Collected(self._job.rank))
            shares = division.shares(collected, self._job.rank, self._job.world_size)
            pieces = [share.piece for share in shares]
            return Size(preflight.predicted(pieces), folder_nbytes(self._folder, collected, pieces))
        except Exception as err:  # noqa: BLE001 - a save will say what is wrong with it
            logger.debug("size of a save not known yet: %s", err)
            return None

    def _stage(self, save: Save, metrics: Mapping[str, float], values: Collected | None) -> None:
        self._is_prepared = True
        self._staging.look_back()
        collected = self._state.collect(self._job.rank, values=values)
        blueprint = self._blueprint(collected)
        said = claims.claims(collected, blueprint.said) | claims.of_option("adapter folder", self._folder)
        outline = self._outline(save, collected, blueprint)
        self._begin_shard(save, outline, blueprint, collected)
        save.proposal = ack.Proposal(
            step=save.key.step,
            said=said,
            part=blueprint.part,
            known_layout=self._life.known_layout(blueprint.part),
            stamp=_stamp(metrics) | {"versions": dict(self._versions)},
            disk=self._disk_need(),
            bases=collected.bases,
        )
        self._events.emit(Point.STAGED, step=save.key.step, attempt=save.key.attempt, nbytes=outline.nbytes)

    def _outline(self, save: Save, collected: Collected, blueprint: Blueprint) -> Outline:
        documents = (collected.documents if self._job.coordinates else {}) | collected.own_documents
        about = {"step": str(save.key.step), "attempt": save.key.attempt, "rank": str(self._job.rank)}
        large = blueprint.large(collected, guarded=self._staging.overlaps)
        return Outline(blueprint.placement, blueprint.sources(collected), documents, about, large)

    def _blueprint(self, collected: Collected) -> Blueprint:
        self._staging.arenas.settle()  # it may be in the making, too
        blueprint = self._blueprints.of(collected)
        if self._staged_with not in {0, self._blueprints.made} and not self._has_said_replanned:
            self._has_said_replanned = True
            logger.info("rank %s: the structure of the state changed since the last save: planned anew", self._job.rank)
        self._staged_with = self._blueprints.made
        return blueprint

    def _disk_need(self) -> DiskNeed:
        """Of all that is not on the disk yet: of this save, and of those still under way."""
        self._unwritten = [(begun, nbytes) for begun, nbytes in self._unwritten if not begun.ended]
        self._unmade = [(pending, nbytes) for pending, nbytes in self._unmade if not pending.local.done()]
        shards_nbytes = sum(nbytes - begun.reserved_nbytes for begun, nbytes in self._unwritten)
        size = Size(shards_nbytes, sum(nbytes for _, nbytes in self._unmade))
        return DiskNeed.measure(self._run.local_path, rank=self._job.rank, size=size)

    def _begin_shard(self, save: Save, outline: Outline, blueprint: Blueprint, collected: Collected) -> None:
        """Hand over to DCP."""
        began = time.perf_counter()
        key, plan = save.key.shard(self._job.rank), blueprint.plan
        staged = self._staging.staged(save, outline, collected)
        try:
            begun = save.shard = shard.begin(
                staged,
                stager=Gate(staged),
                plan=plan,
                writer=shard.ShardWriter(self._run.local_path / key, staged, plan, rank=self._job.rank, key=key),
                process_group=self._job.dcp_group,
            )
        except BaseException:  # nobody is going to write it
            staged.forget()
            raise
        self._unwritten.append((begun, preflight.file_nbytes(outline.nbytes)))
        self._unmade.append((save.pending, blueprint.folder_nbytes))
        self._staging.begun(save, staged, begun, self._state.optimizers())
        if save.copying is None:
            save.pending.timings.stage_s = time.perf_counter() - began


def _stamp(metrics: Mapping[str, float]) -> dict[str, Any]:
    """When, and how good: what the coordinator says, the same in every copy of the manifest."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            numbers[str(name).encode(errors="replace").decode()] = float(value)
        except Exception:  # noqa: BLE001 - a metric never costs a checkpoint, whatever it is
            logger.warning("metric %s is not recorded: %s is not a number", name, type(value).__name__)
    return {
        "created": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "metrics": {name: value if value - value == 0 else str(value) for name, value in numbers.items()},
    }
