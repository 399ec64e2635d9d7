"""The facade: what a training loop sees. It knows the order of the stages and owns the threads.

Threads of one Checkpointer: the training thread (collects and stages), DCP's thread (writes the shard), the
uploader (meets the ranks, uploads, commits, deletes), a heartbeat, and a watcher for unscheduled saves.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import platform
import queue
import threading
import time
import weakref
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any, Self

import torch

from dcpsvc.config import Options
from dcpsvc.errors import (
    ClosedError,
    ConfigError,
    DcpsvcError,
    RankFailure,
    RootError,
    SaveError,
    StateError,
    StepExistsError,
    WaitTimeoutError,
)
from dcpsvc.events import Events, Point
from dcpsvc.format.keys import MAX_STEP, Attempt
from dcpsvc.life import Catalog, Life, Save
from dcpsvc.opening import open_run
from dcpsvc.pending import PendingSave
from dcpsvc.ranks.job import Job
from dcpsvc.ranks.proposals import STOP, Proposals
from dcpsvc.ranks.rendezvous import DisagreementError, Meeting
from dcpsvc.resuming import Resuming
from dcpsvc.stages import ack, shard
from dcpsvc.stages.stage import Arena, ArenaStager, Snapshot
from dcpsvc.state import claims, division
from dcpsvc.state.app import AppState
from dcpsvc.storage.open import open_store

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Mapping, MutableMapping
    from types import TracebackType

    from dcpsvc.state.collected import Collected


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What ``step()`` did.

    Attributes:
        step: The step.
        pending: The save it began; None if none was due.
        should_stop: All ranks agreed to stop after this step.
    """

    step: int
    pending: PendingSave | None
    should_stop: bool

    @property
    def saved(self) -> bool:
        """Whether a save was begun."""
        return self.pending is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Counters of one Checkpointer on this rank.

    Attributes:
        accepted: Saves begun.
        committed: Saves that became checkpoints.
        failed: Saves that did not.
        consecutive_failures: Since the last commit.
        blocked_s: Training time lost in ``save()``, all saves together.
        nbytes: Committed, all ranks.
        newest: Newest committed step; None if there is none.
        resumed_from: Step that was loaded; None on a fresh run.
    """

    accepted: int
    committed: int
    failed: int
    consecutive_failures: int
    blocked_s: float
    nbytes: int
    newest: int | None
    resumed_from: int | None


class Checkpointer:
    """Saves and restores one training run, beside the training.

    ::

        ckpt = dcpsvc.Checkpointer("s3://bucket/runs/exp42", {"model": model, "optim": optimizer}, every=dcpsvc.Every(steps=500))
        with ckpt:
            start = ckpt.resume()
            for step in range(start + 1, total + 1):
                loss = train_one_step()
                if ckpt.step(step, metrics={"loss": loss}).should_stop:
                    break

    Making one is collective: every rank of the default process group does it, in the same order, and every
    rank calls ``resume``, ``step``, ``save`` and ``close`` alike. Works without a process group too.

    Args:
        root: The run root: a directory that all ranks share, or any fsspec URL.
        state: Names to modules, optimizers, Statefuls, tensors, JSON-like values, :class:`PerRank`,
            :class:`Rng`. Kept, and read anew at each save.
        **options: See :class:`~dcpsvc.config.Options`.

    Raises:
        ConfigError: An option or the state makes no sense.
        RootError: On every rank, if any rank cannot use the run root or its local tier.
    """

    def __init__(self, root: str | os.PathLike[str], state: MutableMapping[str, Any], **options: Any) -> None:
        self._options = _options(options)
        self._state = AppState(state)
        remote = open_store(root, self._options.storage_options)
        self._job = _join(remote.url, self._options.sync_timeout_s)
        self._events = Events(rank=self._job.rank, observer=self._options.on_event)
        try:
            self._run = open_run(self._job, remote, self._options.local_dir, self._options.sync_timeout_s)
        except BaseException:
            self._job.leave()
            raise
        catalog = Catalog({attempt.step: attempt for attempt in self._run.committed})
        self._life = Life(self._job, self._run, self._options, self._events, catalog)
        self._uploader = _Uploader(self._life)
        self._arena = Arena()
        self._last_step: int | None = None
        self._saved_step: int | None = None
        self._values: Collected | None = None
        self._versions: tuple[int, ...] = ()
        self._optimizer_moved = False
        self._hooks = [o.register_step_pre_hook(self._note_optimizer) for o in self._state.optimizers()]
        self._tries: dict[int, int] = {}
        self._blocked_s = 0.0
        self._resumed_from: int | None = None
        self._resumes = 0
        self._stopping = False
        self._closed = False
        self._save_began = time.monotonic()
        self._proposals = Proposals(self._job.rendezvous, self._seconds_due)
        self._proposals.start()
        _at_exit(self)
        self._announce()

    def __enter__(self) -> Self:
        """Nothing to do: the constructor opened everything."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; an exception that is under way is never replaced by one of ours."""
        try:
            self.close()
        except Exception as ours:
            if error is None:
                raise
            error.add_note(f"dcpsvc, while closing: {ours}")

    @property
    def state(self) -> MutableMapping[str, Any]:
        """The mapping given to the constructor, with what ``resume()`` put into it."""
        return self._state.mapping

    def resume(self, step: int | None = None, *, skip: Collection[str] = ()) -> int:
        """Continue from the newest valid commit, or from exactly ``step``. Collective; training thread.

        Everything is read and verified on every rank before anything in memory is changed.

        Args:
            step: A committed step; None takes the newest that is whole on all ranks.
            skip: Names of components to leave as they are.

        Returns:
            The step to continue after; 0 on a fresh run.

        Raises:
            NoSuchStepError: ``step`` is not committed, or damaged.
            NoValidCheckpointError: There are commits and all are damaged.
            RestoreFailedError: The state does not fit, or a rank is missing; the same on every rank.
        """
        self._check_open()
        self._resumes += 1
        options = self._options
        resuming = Resuming(
            self._job, f"resume-{self._resumes}", self._run.remote, [self._run.local], self._state,
            options.sync_timeout_s, options.upload_timeout_s,
        )  # fmt: skip
        found = resuming.run(step, skip)
        if found is None:
            self._events.emit(Point.RESUMED, step=0, detail=f"fresh start: nothing is committed at {self._run.remote.url}")
            return 0
        rejected = f"; not used: {'; '.join(found.rejected)}" if found.rejected else ""
        self._events.emit(Point.RESUMED, step=found.attempt.step, attempt=found.attempt.attempt, detail=found.summary + rejected)
        self._forget_damaged(found.attempt.step, explicit=step is not None)
        self._life.catalog.in_use[found.attempt] = "resumed from"
        self._resumed_from = self._last_step = self._saved_step = found.attempt.step
        return found.attempt.step

    def step(self, step: int, *, metrics: Mapping[str, float] | None = None) -> StepOutcome:
        """Tell that ``step`` is complete; saves when the schedule, or the ranks together, say so. Every rank.

        Args:
            step: Larger than the one before.
            metrics: Recorded if this step is saved; rank 0's count.

        Raises:
            SaveError: The failure budget is used up; the last failure.
        """
        self._check_open()
        self._uploader.raise_if_spent(self._options.failure_budget)
        self._check_step(step)
        self._last_step = step
        agreed = self._proposals.at(step)
        self._stopping = self._stopping or agreed == STOP
        every = self._options.every
        due = agreed is not None or (every is not None and every.due(step))
        pending = self.save(step, metrics=metrics) if due and step != self._saved_step else None
        if pending is None and self._options.save_last:
            self._note_last(metrics)
        return StepOutcome(step=step, pending=pending, should_stop=self._stopping)

    def save(self, step: int, *, metrics: Mapping[str, float] | None = None) -> PendingSave:
        """Snapshot the state as of now and let it become a checkpoint in the background. Every rank.

        The state may be changed as soon as this returns. Waits for the copy, and, if the save before is still
        under way, for that one first.

        Args:
            step: Training step; a committed step is never saved again.
            metrics: Recorded with the checkpoint; rank 0's count.

        Raises:
            StepExistsError: The step is committed.
            StateError: An object that cannot be saved, by key. The other ranks get a SaveFailedError.
            ClosedError: After ``close()``.
        """
        self._check_open()
        self._check_step(step)
        return self._save(step, metrics or {}, values=None)

    def request_stop(self) -> None:
        """Have the job save and stop a few steps from now: ``step()`` will say so on every rank. Any rank or thread."""
        self._check_open()
        self._proposals.ask_to_stop()

    def wait(self, timeout_s: float | None = None) -> None:
        """Until every accepted save is committed or has failed, and its retention has run. Any thread.

        Raises:
            WaitTimeoutError: Not yet; the saves go on.
        """
        self._uploader.wait(timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Save the last step if it is not saved, finish what is under way, and leave. Collective; training thread.

        Bounded by the timeouts of the options, or by ``timeout_s``. Further calls do nothing.

        Raises:
            SaveError: The newest save failed.
            WaitTimeoutError: ``timeout_s`` passed; what was under way is abandoned, and is no checkpoint.
        """
        if self._closed:
            return
        try:
            self._save_last()
            self._uploader.wait(timeout_s)
        finally:
            self._leave()
        if (error := self._uploader.last_error) is not None:
            raise error

    def statistics(self) -> Statistics:
        """Counters so far. Any thread."""
        uploader = self._uploader
        return Statistics(
            accepted=uploader.accepted,
            committed=uploader.committed,
            failed=uploader.failed,
            consecutive_failures=uploader.consecutive_failures,
            blocked_s=self._blocked_s,
            nbytes=uploader.nbytes,
            newest=self._life.catalog.newest,
            resumed_from=self._resumed_from,
        )

    # --- saving ---------------------------------------------------------------------------------------

    def _save(self, step: int, metrics: Mapping[str, float], values: Collected | None) -> PendingSave:
        began = time.perf_counter()
        self._refuse_committed(step)
        self._uploader.wait(None)
        self._refuse_committed(step)
        waited_s = time.perf_counter() - began
        key = Attempt(step, f"{self._job.incarnation}-{self._tries.setdefault(step, 0)}")
        self._tries[step] += 1
        save = Save(key=key, pending=PendingSave(*key), began=began, proposal=RankFailure(self._job.rank, "stage", "", ""))
        self._events.emit(Point.SAVE_ACCEPTED, step=step, attempt=key.attempt)
        self._save_began = time.monotonic()
        try:
            self._stage(save, metrics, values)
        except StateError as err:
            save.proposal = RankFailure(self._job.rank, "stage", type(err).__name__, str(err))
            raise
        except Exception as err:  # a failed save never breaks the training step; it is reported by the save itself
            save.proposal = RankFailure(self._job.rank, "stage", type(err).__name__, str(err))
        finally:
            timings = save.pending.timings
            timings.blocked_s, timings.waited_s = save.elapsed_s(), waited_s
            self._blocked_s += timings.blocked_s
            self._saved_step = step
            self._values = None
            self._uploader.accept(save)
        return save.pending

    def _stage(self, save: Save, metrics: Mapping[str, float], values: Collected | None) -> None:
        """Collect, compare-ready, copy; DCP's thread then waits at the gate."""
        began = time.perf_counter()
        rank, world_size = self._job.rank, self._job.world_size
        collected = self._state.collect(rank, values=values)
        documents = (collected.documents if self._job.coordinates else {}) | collected.own_documents
        stamp = _stamp(metrics)
        said = claims.claims(collected, verify_replicas=world_size > 1)
        about = {"step": str(save.key.step), "attempt": save.key.attempt, "rank": str(rank)}
        snapshot = Snapshot(self._arena, division.shares(collected, rank, world_size), documents, about)
        part = ack.part(snapshot.placement, rank, collected.aliases)
        save.stager = ArenaStager(snapshot)
        path = self._run.local_path / save.key.shard(rank)
        save.writer = shard.ShardWriter(path, snapshot.image, rank=rank, key=save.key.shard(rank))
        save.written = shard.begin(
            snapshot.tensors, stager=save.stager, placement=snapshot.placement, writer=save.writer,
            process_group=self._job.dcp_group,
        )  # fmt: skip
        save.proposal = ack.Proposal(
            step=save.key.step, said=said, part=part, known_layout=self._life.known_layout(part), stamp=stamp
        )
        save.pending.timings.stage_s = time.perf_counter() - began
        save.pending.resolve(save.pending.staged)
        self._events.emit(Point.STAGED, step=save.key.step, attempt=save.key.attempt, nbytes=len(snapshot.image))

    def _refuse_committed(self, step: int) -> None:
        attempt = self._life.catalog.attempts.get(step)
        if attempt is not None:
            raise StepExistsError(step, attempt.attempt, self._life.catalog.newest)

    # --- the last step --------------------------------------------------------------------------------

    def _note_last(self, metrics: Mapping[str, float] | None) -> None:
        """Keep what would be gone when the loop ends in the middle of the next step: generators, loader, counters."""
        began = time.perf_counter()
        self._last_metrics = dict(metrics or {})
        self._optimizer_moved = False
        self._versions = self._state.versions()
        with contextlib.suppress(StateError):  # what cannot be saved is reported by the save, with its key
            self._values = self._state.collect_values(self._job.rank)
        self._blocked_s += time.perf_counter() - began

    def _note_optimizer(self, *_: object) -> None:
        self._optimizer_moved = True

    def _save_last(self) -> None:
        """Save the last complete step, if the model still is what it was then."""
        step = self._last_step
        if not self._options.save_last or step is None or step == self._saved_step:
            return
        if self._optimizer_moved or self._versions != self._state.versions():
            detail = "the last step is not saved: the model was changed after step() was told of it"
            self._events.emit(Point.SAVE_FAILED, step=step, detail=detail, level=logging.WARNING)
            return
        self._save(step, self._last_metrics, values=self._values)

    # --- the rest -------------------------------------------------------------------------------------

    def _seconds_due(self) -> bool:
        every = self._options.every
        return every is not None and every.seconds is not None and time.monotonic() - self._save_began >= every.seconds

    def _forget_damaged(self, resumed: int, *, explicit: bool) -> None:
        """Newer commits that resume fell back from are damaged: their steps may be saved anew."""
        attempts = self._life.catalog.attempts
        if not explicit:
            for newer in [step for step in attempts if step > resumed]:
                del attempts[newer]

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"this Checkpointer of {self._run.remote.url} is closed")

    def _check_step(self, step: int) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MAX_STEP:
            raise ConfigError(f"step={step!r} must be an int in 0..{MAX_STEP}")

    def _announce(self) -> None:
        every = self._options.every
        schedule = "only on save() and at the end" if every is None else repr(every)
        detail = (
            f"root={self._run.remote.url} local={self._run.local_path} run_id={self._run.run_id} "
            f"world_size={self._job.world_size} newest={self._life.catalog.newest} saves: {schedule}"
        )
        self._events.emit(Point.OPENED, detail=detail)

    def _leave(self) -> None:
        """Say goodbye so that nobody's store disappears under a peer; then stop every thread."""
        self._closed = True
        for hook in self._hooks:
            hook.remove()
        with contextlib.suppress(DisagreementError, RuntimeError):  # a peer that is gone cannot be waited for
            self._job.meet("close", None, lambda _: None, Meeting(self._options.sync_timeout_s, self._options.sync_timeout_s))
            self._job.linger("close", self._options.sync_timeout_s)
        self._proposals.stop()
        self._uploader.stop()
        self._job.leave()
        self._run.release()
        statistics = self.statistics()
        self._events.emit(Point.CLOSED, step=statistics.newest, detail=f"{statistics.committed} committed, {statistics.failed} failed")

    def close_at_exit(self) -> None:
        """The interpreter ends and nobody called ``close()``: do it now, and log what it says."""
        try:
            self.close()
        except (DcpsvcError, RuntimeError) as err:
            logging.getLogger("dcpsvc").error("at exit: %s", err)  # noqa: TRY400 - nobody reads a traceback here


class _Uploader:
    """The background thread and its queue; one save at a time."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._queue: queue.SimpleQueue[Save | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._current = ""
        self.accepted = self.committed = self.failed = self.consecutive_failures = self.nbytes = 0
        self.last_error: SaveError | None = None
        self._thread = threading.Thread(target=self._run, name="dcpsvc-uploader", daemon=True)
        self._thread.start()

    def accept(self, save: Save) -> None:
        """Take a save over from the training thread."""
        self.accepted += 1
        self._current = f"step {save.key.step}"
        self._idle.clear()
        self._queue.put(save)

    def wait(self, timeout_s: float | None) -> None:
        """Until nothing is under way. Without a timeout, the timeouts of the stages bound it."""
        if not self._idle.wait(timeout_s):
            raise WaitTimeoutError(timeout_s or 0.0, (self._current,))

    def raise_if_spent(self, budget: int) -> None:
        """Raise the last failure once there were ``budget`` in a row; then count anew."""
        if self.consecutive_failures >= budget and self.last_error is not None:
            error, self.last_error, self.consecutive_failures = self.last_error, None, 0
            raise error

    def stop(self) -> None:
        """End the thread; a save that hangs is left to its own deadline."""
        self._queue.put(None)
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while (save := self._queue.get()) is not None:
            self._count(save, self._life.live(save))
            self._idle.set()

    def _count(self, save: Save, error: SaveError | None) -> None:
        self.last_error = error
        if error is None:
            self.committed += 1
            self.consecutive_failures = 0
            self.nbytes += save.pending.timings.nbytes
        else:
            self.failed += 1
            self.consecutive_failures += 1


def _at_exit(checkpointer: Checkpointer) -> None:
    """Close at the end of the interpreter, while its threads still work: a plain atexit hook comes too late to
    begin a save, because thread pools have been told to end by then.
    """
    reference = weakref.ref(checkpointer)

    def close() -> None:
        if (alive := reference()) is not None:
            alive.close_at_exit()

    register = getattr(threading, "_register_atexit", atexit.register)
    register(close)


def _options(given: dict[str, Any]) -> Options:
    try:
        return Options(**given)
    except TypeError as err:
        raise ConfigError(f"Checkpointer: {err}") from err


def _join(url: str, timeout_s: float) -> Job:
    try:
        return Job.join(timeout_s)
    except DisagreementError as err:
        reason = f"ranks {err.missing} did not make their Checkpointer within {err.waited_s:.1f} s"
        raise RootError(url, reason) from None


def _stamp(metrics: Mapping[str, float]) -> dict[str, Any]:
    """What the coordinator says about a checkpoint, the same in every copy of its manifest."""
    numbers = {str(name): float(value) for name, value in metrics.items()}
    return {
        "created": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "metrics": {name: value if value - value == 0 else str(value) for name, value in numbers.items()},
        "versions": {
            "dcpsvc": metadata.version("dcpsvc"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }
