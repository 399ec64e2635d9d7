"""What the training loop gets back: promises of a save, what it cost, what a step did, counters."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, InvalidStateError, wait
from dataclasses import dataclass

from dcpsvc.errors import SaveSkippedError, WaitTimeoutError


@dataclass(slots=True)
class Timings:
    """Seconds and bytes of one save on this rank.

    Attributes:
        blocked_s: What the training thread waited inside ``save()``.
        held_s: What optimizers waited afterwards, before they stepped, for the rest of the copy.
        waited_s: The part of it spent waiting for the save before.
        stage_s: From the first tensor copied into the arena to the last.
        write_s: Writing and syncing the local file.
        local_s: From the call to "every rank's shard is durable on its local tier".
        upload_s: Carrying the shard to the run root and proving it.
        commit_lag_s: From the call to the commit.
        nbytes: Of the whole checkpoint, all ranks.
        shard_nbytes: Of this rank's shard.
        copied_nbytes: Of it, what the run root copied from the checkpoint before instead of having it sent.
    """

    blocked_s: float = 0.0
    held_s: float = 0.0
    waited_s: float = 0.0
    stage_s: float = 0.0
    write_s: float = 0.0
    local_s: float = 0.0
    upload_s: float = 0.0
    commit_lag_s: float = 0.0
    nbytes: int = 0
    shard_nbytes: int = 0
    copied_nbytes: int = 0


class PendingSave:
    """A save that was accepted.

    Attributes:
        step: Training step.
        attempt: Which try.
        staged: Resolves when the whole state may change; the optimizers of the state wait for their part by
            themselves. With ``staging="block"`` done already when ``save()`` returns.
        local: Resolves when every rank's shard is durable on its local tier.
        committed: Resolves when the checkpoint exists; holds the SaveError if it failed.
        timings: Complete once ``committed`` is done.
    """

    def __init__(self, step: int, attempt: str) -> None:
        self.step, self.attempt = step, attempt
        self.staged: Future[None] = Future()
        self.local: Future[None] = Future()
        self.committed: Future[None] = Future()
        self.timings = Timings()

    @property
    def state(self) -> str:
        """``pending``, ``committed``, ``skipped`` or ``failed``."""
        if not self.committed.done():
            return "pending"
        error = self.committed.exception()
        return "committed" if error is None else "skipped" if isinstance(error, SaveSkippedError) else "failed"

    def wait(self, timeout_s: float | None = None) -> None:
        """Until the checkpoint is committed. Any thread.

        Raises:
            SaveError: It was not. A restart on the same disks may still finish its upload.
            WaitTimeoutError: Not yet; the save goes on.
        """
        if not wait([self.committed], timeout_s).done:
            raise WaitTimeoutError(timeout_s or 0.0, (f"step {self.step}",))
        if error := self.committed.exception():
            raise error

    def resolve(self, promise: Future[None], error: BaseException | None = None) -> None:
        """Keep a promise, or break it and those that follow; one that is done already stays as it is."""
        for later in [promise] if error is None else [self.staged, self.local, self.committed]:
            with contextlib.suppress(InvalidStateError):  # two threads may come here at once
                if error is None:
                    later.set_result(None)
                else:
                    later.set_exception(error)

    def __repr__(self) -> str:
        return f"PendingSave(step={self.step}, attempt={self.attempt!r}, state={self.state!r})"


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
        return self.pending is not None and self.pending.state != "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Counters of one Checkpointer on this rank.

    Attributes:
        accepted: Saves begun.
        committed: Saves that became checkpoints.
        failed: Saves that did not.
        skipped: Saves that were left out, or given up for newer ones, as ``backpressure`` says.
        consecutive_failures: Since the last commit.
        blocked_s: Training time lost in ``save()`` and before the next step of an optimizer, all saves together.
        nbytes: Committed, all ranks.
        newest: Newest committed step; None if there is none.
        resumed_from: Step that was loaded; None on a fresh run.
        slowest: The rank that the newest commit of this job waited for, where and how long; empty if none stood out.
        retries: Calls to stores that were made again, in this process since the Checkpointer was opened.
        failures: Why the last few saves that failed did.
    """

    accepted: int
    committed: int
    failed: int
    skipped: int
    consecutive_failures: int
    blocked_s: float
    nbytes: int
    newest: int | None
    resumed_from: int | None
    slowest: str = ""
    retries: int = 0
    failures: tuple[str, ...] = ()
