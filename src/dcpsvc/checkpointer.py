"""The facade: what a training loop sees. It knows the order of the stages and owns the threads.

Threads of one Checkpointer: the training thread (collects and stages), DCP's thread (writes the shard), the
uploader (meets the ranks, uploads, commits, deletes), a heartbeat, and a watcher for unscheduled saves.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Self

from dcpsvc import provenance
from dcpsvc.assembly import assemble
from dcpsvc.atexit import at_exit
from dcpsvc.config import Options
from dcpsvc.errors import ClosedError, DcpsvcError
from dcpsvc.resuming import Resumed, Resuming
from dcpsvc.saves import check_step
from dcpsvc.state.app import AppState
from dcpsvc.state.collected import Collected
from dcpsvc.state.drift import Terms
from dcpsvc.state.sharing import bare, world_size
from dcpsvc.storage.open import open_store

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, MutableMapping
    from concurrent.futures import Future
    from types import TracebackType

    from dcpsvc.opening import Place
    from dcpsvc.pending import PendingSave, Statistics, StepOutcome
    from dcpsvc.ranks.job import Job
    from dcpsvc.storage.base import Store


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
        self._options = chosen = Options.of(options)
        self._state = AppState(state, chosen.only)
        if chosen.adapter_folder is not None:
            self._state.check_module(chosen.adapter_folder)
        self._record = provenance.record(map(bare, state.values()), world_size=world_size(), config=chosen.config)
        remote = open_store(root, chosen.storage_options, limits=chosen.limits)
        parts = assemble(remote, self._state, chosen, self._record, self._let_go)
        self._job, self._run, self._catalog = parts.job, parts.run, parts.catalog
        self._saver, self._saves, self._uploader = parts.saver, parts.saves, parts.uploader
        self._last, self._steering, self._guard = parts.last, parts.steering, parts.guard
        self._announcer, self._annotator = parts.announcer, parts.annotator
        self._stepping, self._standing, self._ending = parts.stepping, parts.standing, parts.ending
        self._resumes, self._closed, self._pid = 0, False, os.getpid()
        self._steering.start(self._run.run_id, self._standing.status)
        at_exit(self)
        self._announcer.opened(self._catalog.newest, parts.predicted)

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
            strict: False lets pass, and tells, what only one side has; shapes and dtypes must fit.
            even_diverged: Take the newest even if it is tagged; one that is named is taken anyway.

        Returns:
            The step to continue after; 0 on a fresh run.

        Raises:
            NoSuchStepError: ``step`` is not committed, or damaged; StepDeletedError, if it is being deleted.
            NoValidCheckpointError: There are commits and all are damaged.
            RestoreFailedError: The state does not fit, or a rank is missing; the same on every rank.
        """
        self._check_open()
        self._resumes += 1
        options = self._options
        resuming = Resuming(
            self._job, f"resume-{self._resumes}", self._run.remote, [self._run.local], self._state,
            options.sync_timeout_s, options.upload_timeout_s, self._catalog.hold, even_diverged,
            self._run.settled.deleted, self._run.local_path, options.read_together,
        )  # fmt: skip
        self._saver.wait_copied()
        found = resuming.run(step, Terms(strict=strict, skip=tuple(skip), rename=dict(rename or {})))
        self._saver.prepare_once(Collected(self._job.rank))
        self._announcer.resumed(found)
        return 0 if found is None else self._go_on_from(found, named=step is not None)

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
        check_step(step)
        self._last.tell(step)
        return self._stepping.complete(step, self._guard.watch(step, metrics))

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
        check_step(step)
        self._saves.check_new(step)
        return self._saves.begin(step, self._guard.watch(step, metrics))

    def record_metrics(self, step: int, metrics: Mapping[str, float]) -> Future[None]:
        """Add numbers to a checkpoint after it was saved, as an evaluation does. Any rank or thread; rank 0's count.

        They count from the next commit on, for ``Best(...)``; where a name was recorded before, the later number does.
        Returns at once; a save under way gets them when it is committed, the last step when the end saves it.

        Returns:
            Done when they are durable; a CheckpointGoneError: no such checkpoint, and no save of the last step.

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
            self._ending.finish(timeout_s, failed=failed)
            error = self._uploader.last_error
        finally:
            self._closed = True
            self._ending.leave()
            self._announcer.closed(self.statistics(), self._steering.stopping, self._last.step)
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

    def close_at_exit(self) -> None:
        """The interpreter ends and nobody called ``close()``: do it now, and log what it says."""
        try:
            self.close()
        except (DcpsvcError, RuntimeError) as err:
            logging.getLogger("dcpsvc").error("at exit: %s", err)  # noqa: TRY400 - nobody reads a traceback here

    def _go_on_from(self, found: Resumed, *, named: bool) -> int:
        """The state is a checkpoint's: so is everything that goes on from it."""
        step = self._standing.resumed_from = found.attempt.step
        newer = self._catalog.set_aside(step, damaged=not named)
        self._announcer.went_behind(step, newer if named else [])
        self._catalog.hold(found.attempt)
        self._guard.resumed(found.metrics)
        self._announcer.differs(step, provenance.changes(found.versions, self._record))
        self._last.begin_at(step)
        return step

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"this Checkpointer of {self._run.remote.url} is closed")

    def _let_go(self, job: Job, run: Place) -> None:
        """The uploader has ended: nobody uses the group, the heartbeat and this rank's place any more.

        As a method, so that its thread keeps a Checkpointer alive that nobody closed: it is closed at exit.
        """
        job.leave()
        run.release()
