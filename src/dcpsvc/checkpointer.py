"""The facade: what a training loop sees. It knows the order of the stages and owns the threads.

Threads of one Checkpointer: the training thread (collects and stages), DCP's thread (writes the shard), the
uploader (meets the ranks, uploads, commits, deletes), a heartbeat, and a watcher for unscheduled saves.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from typing import TYPE_CHECKING, Any, Self

from dcpsvc import provenance
from dcpsvc.admission import Admission
from dcpsvc.annotating import Annotator
from dcpsvc.announcing import Announcer
from dcpsvc.atexit import at_exit
from dcpsvc.catalog import Catalog
from dcpsvc.closing import Ending
from dcpsvc.config import Options
from dcpsvc.errors import (
    ClosedError,
    ConfigError,
    DcpsvcError,
    FencedError,
    WaitTimeoutError,
)
from dcpsvc.events import Events, Point
from dcpsvc.format.keys import MAX_STEP
from dcpsvc.guarding import Guard
from dcpsvc.laststep import LastStep
from dcpsvc.life import Life
from dcpsvc.observing import Observers, flush
from dcpsvc.observing.runlog import RunLog
from dcpsvc.opening import join, open_run
from dcpsvc.pending import StepOutcome
from dcpsvc.ranks.proposals import SAVE, STOP
from dcpsvc.ranks.rendezvous import DisagreementError, Meeting
from dcpsvc.resuming import Resuming
from dcpsvc.saves import Saves
from dcpsvc.saving import Saver
from dcpsvc.standing import Standing
from dcpsvc.state.app import AppState
from dcpsvc.state.collected import Collected
from dcpsvc.state.drift import Terms
from dcpsvc.state.sharing import bare, world_size
from dcpsvc.steering import Steering
from dcpsvc.storage.open import open_store
from dcpsvc.uploader import Uploader

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, MutableMapping
    from concurrent.futures import Future
    from pathlib import Path
    from types import TracebackType

    from dcpsvc.events import Event
    from dcpsvc.pending import PendingSave, Statistics
    from dcpsvc.storage.base import Store


_GOODBYE_S = 1.0
"""At least so long the peers are waited for at the end, however long notes beside checkpoints took."""


class Checkpointer:
    """Saves and restores one training run, beside the training.

    ::

        ckpt = dcpsvc.Checkpointer(
            "s3://bucket/runs/exp42", {"model": model, "optim": optimizer}, every=dcpsvc.Every(steps=500)
        )
        with ckpt:
            start = ckpt.resume()
            for step in range(start + 1, total + 1):
                loss = train_one_step()
                if ckpt.step(step, metrics={"loss": loss}).should_stop:
                    break

    Making one is collective: every rank of the default process group does it, in the same order, and every
    rank calls ``resume``, ``step``, ``save`` and ``close`` alike. Works without a process group too.

    Args:
        root: The run root: a directory that all ranks share, any fsspec URL, or a :class:`~dcpsvc.storage.base.Store`.
        state: Names to modules, optimizers, Statefuls, tensors, JSON-like values, :class:`PerRank`,
            :class:`Rng`. Kept, and read anew at each save.
        **options: See :class:`~dcpsvc.config.Options`.

    Raises:
        ConfigError: An option or the state makes no sense.
        RootError: On every rank, if any rank cannot use the run root or its local tier.
    """

    def __init__(self, root: str | os.PathLike[str] | Store, state: MutableMapping[str, Any], **options: Any) -> None:
        self._options = Options.of(options)
        self._state = AppState(state, self._options.only)
        if self._options.adapter_folder is not None:
            self._state.check_module(self._options.adapter_folder)
        self._record = provenance.record(
            map(bare, state.values()), world_size=world_size(), config=self._options.config
        )
        remote = open_store(root, self._options.storage_options, limits=self._options.limits)
        self._job = join(remote.url, self._options.sync_timeout_s)
        try:
            self._run = open_run(self._job, remote, self._options.local_dir, self._options)
        except BaseException:  # whatever it is, no thread stays behind
            self._job.leave()
            raise
        observer = _observer(self._options, remote, self._run.local_path)
        self._events = Events(rank=self._job.rank, observer=observer)
        settled = self._run.settled
        self._catalog = Catalog(
            {attempt.step: attempt for attempt in settled.committed}, leftovers=set(settled.unfinished)
        )
        self._life = Life(self._job, self._run, self._options, self._events, self._catalog)
        self._uploader = Uploader(self._life, self._let_go, functools.partial(flush, observer))
        self._saver = saver = Saver(
            self._job, self._run, self._state, self._life, self._events, options=self._options, versions=self._record
        )
        predicted_nbytes = saver.predicted_nbytes()
        try:
            self._life.check_room(predicted_nbytes)
        except BaseException:  # whatever it is, no thread stays behind, and the place is given back
            self._uploader.stop()
            raise
        admission = Admission(self._job, self._options, self._uploader)
        self._saves = Saves(admission, saver, self._uploader, self._catalog, self._events)
        self._last = LastStep(self._state, self._job.rank)
        self._steering = Steering(self._job, self._options, self._seconds_due)
        self._announcer = Announcer(self._job, self._run, self._options, self._events)
        uploader, upload_s = self._uploader, self._options.upload_timeout_s
        self._annotator = Annotator(self._job, remote, self._catalog, lambda: uploader.under_way, upload_s)
        self._guard = Guard(self._options.divergence, self._job, self._annotator, self._steering.ask_to_stop)
        self._ending = Ending(uploader, self._steering, self._announcer, self._catalog)
        self._standing = Standing(
            run=self._run, world_size=self._job.world_size, catalog=self._catalog, saves=self._saves,
            uploader=self._uploader, last=self._last, steering=self._steering, announcer=self._announcer,
        )  # fmt: skip
        self._resumes = 0
        self._closed = False
        self._pid = os.getpid()
        self._steering.start(self._run.run_id, self._standing.status)
        at_exit(self)
        self._announcer.opened(self._catalog.newest, predicted_nbytes)

    def __enter__(self) -> Self:
        """Nothing to do: the constructor opened everything."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; an exception that is under way is never replaced by one of ours."""
        try:
            self.close(failed=error is not None)
        except Exception as ours:  # the user's own exception counts more than any of ours
            if error is None:
                raise
            error.add_note(f"dcpsvc, while closing: {ours}")

    @property
    def state(self) -> MutableMapping[str, Any]:
        """The mapping given to the constructor, with what ``resume()`` put into it."""
        return self._state.mapping

    def resume(
        self,
        step: int | None = None,
        *,
        skip: Collection[str] = (),
        rename: Mapping[str, str] | None = None,
        strict: bool = True,
        even_diverged: bool = False,
    ) -> int:
        """Continue from the newest valid commit, or from exactly ``step``. Collective; training thread.

        Everything is read and verified on every rank before anything in memory is changed.

        Args:
            step: A committed step; None takes the newest that is whole on all ranks and not tagged as diverged.
            skip: Components, or keys of modules and optimizers by their dotted beginning, to leave as they are.
            rename: Saved keys by their dotted beginning, and what they are called here.
            strict: False lets pass what only the checkpoint or only the state has. Shapes and dtypes must fit all the
                same.
            even_diverged: Take the newest even if it is tagged; one that is named is taken anyway.

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
            options.sync_timeout_s, options.upload_timeout_s, self._catalog.hold, even_diverged,
            self._run.local_path,
        )  # fmt: skip
        self._saver.wait_copied()
        found = resuming.run(step, Terms(strict=strict, skip=tuple(skip), rename=dict(rename or {})))
        self._saver.prepare_once(Collected(self._job.rank))
        self._announcer.resumed(found)
        if found is None:
            return 0
        newer = self._catalog.set_aside(found.attempt.step, damaged=step is None)
        self._announcer.went_behind(found.attempt.step, newer if step is not None else [])
        self._catalog.hold(found.attempt)
        self._guard.resumed(found.metrics)
        self._standing.resumed_from = found.attempt.step
        if self._job.coordinates:
            for change in provenance.changes(found.versions, self._record):
                logging.getLogger("dcpsvc").warning("resumed step %s: %s", found.attempt.step, change)
        self._last.begin_at(found.attempt.step)
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
        if self._last.step is not None and step <= self._last.step:
            raise ConfigError(f"step({step}) after step {self._last.step}: steps must grow")
        self._last.step = step
        metrics = self._guard.watch(step, metrics)
        agreed = self._steering.at(step)
        every = self._options.every
        due = agreed in {SAVE, STOP} or (agreed is None and every is not None and every.due(step))
        pending = self._save(step, metrics, must=agreed is not None) if due and step != self._last.saved else None
        if agreed is not None:
            begun = self._saves.last
            self._steering.tell(step, agreed, begun if begun is not None and begun.step == step else None)
            self._last.wanted = agreed in {SAVE, STOP}
        if self._last.unsaved == step:
            self._last.note(metrics)
            self._saver.prepare_once(self._last.values)
        return StepOutcome(step=step, pending=pending, should_stop=bool(self._steering.stopping))

    def prepare(self) -> None:
        """Take the memory for saves now, in the background, so that the first one costs what later ones do.

        ``resume()`` and the first ``step()`` do it by themselves, once the optimizers have their state; for a loop that
        calls neither before its first save. Reads every value of the state, as a save does. Training thread.
        """
        self._check_open()
        self._saver.prepare()

    def save(self, step: int, *, metrics: Mapping[str, float] | None = None) -> PendingSave:
        """Snapshot the state as of now and let it become a checkpoint in the background. Every rank.

        When this returns, buffers, plain values and small tensors are copied, and optimizers may step: each waits for
        what is left of its own. Whoever changes large parameters or moments in another way waits for ``pending.staged``
        first, or this save fails; with ``staging="block"`` everything is copied. Where ``max_inflight`` saves are under
        way it waits for one of them first, as ``backpressure`` says.

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
        self._saves.check_new(step)
        pending = self._saves.begin(step, self._guard.watch(step, metrics))
        if pending.state != "skipped":
            self._last.save_begun(step)
        return pending

    def record_metrics(self, step: int, metrics: Mapping[str, float]) -> Future[None]:
        """Add numbers to a checkpoint after it was saved, as an evaluation does. Any rank or thread; rank 0's count.

        They count from the next commit on, for ``Best(...)``; where a name was recorded before, the later number does.
        Returns at once; a save that is still under way gets them when it is committed.

        Args:
            step: A committed step, or one being saved.
            metrics: Numbers by name.

        Returns:
            Done when they are durable; holds a CheckpointGoneError if there is no such checkpoint, or no longer.

        Raises:
            ConfigError: Something is no number.
        """
        self._check_open()
        return self._annotator.record(step, metrics)

    def pin(self, step: int, note: str = "") -> Future[None]:
        """Have a checkpoint stay until :meth:`unpin`, whatever the policy. As :meth:`record_metrics`."""
        self._check_open()
        return self._annotator.pin(step, note)

    def unpin(self, step: int) -> Future[None]:
        """Leave a checkpoint to the policy again: every pin of it goes. As :meth:`record_metrics`."""
        self._check_open()
        return self._annotator.unpin(step)

    def request_stop(self) -> None:
        """Have the job save and stop a few steps from now: ``step()`` will say so on every rank. Any rank or thread."""
        self._check_open()
        self._steering.ask_to_stop("request_stop()")

    def wait(self, timeout_s: float | None = None) -> None:
        """Until every accepted save is committed or has failed, and retention has done what it may. Any thread.

        Raises:
            WaitTimeoutError: Not yet; the saves go on.
        """
        self._uploader.wait(timeout_s)

    def close(self, timeout_s: float | None = None, *, failed: bool = False) -> None:
        """Save the last step if it is not saved, finish what is under way, and leave. Collective; training thread.

        Bounded by the timeouts of the options, by ``timeout_s``, and after a preemption by ``grace_s``: what is on all
        local disks by then is finished by the next start. Further calls do nothing, nor does a call in a forked child.

        Args:
            timeout_s: Longest wait for what is under way.
            failed: The loop ended in the middle of a step; ``with`` knows by itself.

        Raises:
            SaveError: The newest save failed.
            WaitTimeoutError: ``timeout_s`` passed; what was under way is abandoned, unless its manifest is being
                written already. What is on all local disks is finished by the next start.
        """
        if self._closed or os.getpid() != self._pid:
            return
        try:
            self._ending.finish(timeout_s, functools.partial(self._save_last, failed=failed))
            error = self._uploader.last_error
        finally:
            self._leave()
        if error is not None:
            raise error

    @property
    def exit_code(self) -> int:
        """0, or 75 (EX_TEMPFAIL) if the job was asked to stop before its end: for ``sys.exit()``."""
        return self._steering.exit_code

    @property
    def stop_reason(self) -> str:
        """Why all ranks were asked to stop, for people; empty if they were not."""
        return self._steering.stopping

    def statistics(self) -> Statistics:
        """Counters so far. Any thread."""
        return self._standing.statistics()

    def _save(self, step: int, metrics: Mapping[str, float], *, must: bool) -> PendingSave | None:
        self._saves.check_new(step)
        try:
            pending = self._saves.begin(step, metrics, must=must, left_s=self._steering.left_s())
        except WaitTimeoutError as err:  # a preemption whose time is over: training has to end
            self._announcer.cut_short(err.pending, self._catalog.newest_local)
            return None
        if pending.state != "skipped":
            self._last.save_begun(step)
        return pending

    def _save_last(self, *, failed: bool) -> None:
        """Save the last complete step, if the model still is what it was then."""
        step = self._last.unsaved
        if not self._options.save_last or step is None or isinstance(self._uploader.last_error, FencedError):
            return
        if reason := self._last.obstacle(in_a_step=failed):
            detail = f"the last step is not saved: {reason}"
            self._events.emit(Point.SAVE_FAILED, step=step, detail=detail, level=logging.WARNING)
        else:
            left_s = self._steering.left_s()
            self._saves.begin(step, self._last.metrics, values=self._last.values, must=True, left_s=left_s)
            self._last.save_begun(step)

    def _seconds_due(self) -> bool:
        every = self._options.every
        return (
            every is not None
            and every.seconds is not None
            and time.monotonic() - self._saves.last_began >= every.seconds
        )

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"this Checkpointer of {self._run.remote.url} is closed")

    def _check_step(self, step: object) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MAX_STEP:
            raise ConfigError(f"step={step!r} must be an int in 0..{MAX_STEP}")

    def _leave(self) -> None:
        """Say goodbye so that nobody's store disappears under a peer; then stop every thread."""
        self._closed = True
        self._last.close()
        self._life.abandoned.set()  # what is still under way, on every rank
        left_s = self._steering.left_s()
        patience_s = self._options.sync_timeout_s if left_s is None else min(self._options.sync_timeout_s, left_s + 2.0)
        ends = time.monotonic() + patience_s
        self._annotator.close(patience_s)
        patience_s = max(_GOODBYE_S, ends - time.monotonic())
        with contextlib.suppress(DisagreementError, RuntimeError):  # a peer that is gone cannot be waited for
            self._job.meet("close", None, lambda _: None, Meeting(patience_s, patience_s))
            self._job.linger("close", patience_s)
        self._uploader.stop()
        self._saver.close()
        self._steering.stop()
        self._announcer.closed(self.statistics(), self._steering.stopping, self._last.step)

    def _let_go(self) -> None:
        """The uploader has ended: nobody uses the group, the heartbeat and this rank's place any more."""
        self._job.leave()
        self._run.release()

    def close_at_exit(self) -> None:
        """The interpreter ends and nobody called ``close()``: do it now, and log what it says."""
        try:
            self.close()
        except (DcpsvcError, RuntimeError) as err:
            logging.getLogger("dcpsvc").error("at exit: %s", err)  # noqa: TRY400 - nobody reads a traceback here


def _observer(options: Options, remote: Store, local_path: Path) -> Callable[[Event], None] | None:
    if not options.run_log:
        return options.on_event
    log = RunLog(remote, spool=local_path / "events")
    return log if options.on_event is None else Observers(log, options.on_event)
