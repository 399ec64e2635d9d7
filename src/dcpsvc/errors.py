"""Every error dcpsvc raises, as one tree. Callers decide by type, never by text.

::

    DcpsvcError
    |-- ConfigError                 an option that makes no sense
    |-- ClosedError                 the Checkpointer is closed, or not open yet
    |-- RootError                   the run root or the local tier cannot be used
    |   |-- NoRunError              nothing is stored there
    |   |-- UnsupportedFormatError  the root was written by another format version
    |   |-- DestinationError        a copy cannot go there: another run, or a later checkpoint
    |   `-- RunBusyError            another live process on this host writes this run
    |-- StateError                  something in the state cannot be saved or loaded as declared
    |   |-- UnsupportedStateError   an object that is neither tensor nor JSON-like, named by key
    |   |-- SharingError            a declaration that this rank, or another component, contradicts
    |   |-- StateMismatchError      the checkpoint and the state in memory do not fit
    |   |   `-- StructureMismatchError  in keys, shapes or dtypes: with a table of all differences
    |   `-- TornSnapshotError       a tensor was changed while it was being copied
    |-- SaveError                   one attempt to save one step did not become a checkpoint
    |   |-- SaveFailedError         ranks failed, or disagreed about what to save
    |   |-- RanksMissingError       ranks did not arrive before the deadline
    |   |-- FencedError             a newer job has taken the run root over; this one must end
    |   |-- SaveSkippedError        left out, or given up for a newer one, as backpressure= says; no failure
    |   |-- CommitUnknownError      the commit may or may not have happened; only the store can tell
    |   `-- StepExistsError         the step is already committed
    |-- RestoreError                a checkpoint cannot be read back
    |   |-- NoSuchStepError         an explicitly named step that is not there
    |   |   `-- StepDeletedError    it was, and is being deleted, or was while somebody read it
    |   |-- NoValidCheckpointError  commits exist, and every one of them is damaged
    |   `-- RestoreFailedError      a rank could not read, or did not arrive
    |-- CheckpointGoneError         metrics or a pin for a checkpoint that is not there, or being deleted
    |-- RemovalRefusedError         a checkpoint that must not be deleted: the last one, pinned, in use
    |-- ExportError                 a checkpoint cannot be written in a foreign format
    |-- ForeignFormatError          what another library wrote cannot be taken
    |-- FormatError                 a file of ours that does not say what it should
    |   |-- ManifestError
    |   |-- LayoutError
    |   `-- CorruptShardError       bytes that do not match their checksum, or are missing
    |-- StoreError                  the run root's store said no
    |   |-- StoreNotFoundError
    |   |-- StoreObjectError        an object that is not what it should be
    |   |-- StoreAccessError        credentials or permissions
    |   |-- StoreFullError          no space left
    |   `-- StoreUnavailableError   transient: worth another try
    |       `-- StoreThrottledError the server asks for fewer requests
    `-- WaitTimeoutError            wait() or close() ran out of time
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankFailure:
    """What one rank says about its own failure; travels between ranks as JSON, never as an exception."""

    rank: int
    phase: str
    error: str
    """Name of the exception's type."""
    text: str

    def __str__(self) -> str:
        return f"rank {self.rank} failed in {self.phase}: {self.error}: {self.text}"


class DcpsvcError(Exception):
    """Root of the tree."""


class ConfigError(DcpsvcError):
    """An option that makes no sense, alone or beside another."""


class ClosedError(DcpsvcError):
    """The Checkpointer is closed, or was never opened."""


class WaitTimeoutError(DcpsvcError):
    """``wait()`` or ``close()`` ran out of time; what is pending goes on."""

    def __init__(self, waited_s: float, pending: tuple[str, ...]) -> None:
        super().__init__(waited_s, pending)
        self.waited_s, self.pending = waited_s, pending

    def __str__(self) -> str:
        return f"after {self.waited_s:.1f} s still waiting for: {', '.join(self.pending)}"


# --- the run root ---------------------------------------------------------------------------------


class RootError(DcpsvcError):
    """The run root, or the local tier, cannot be used; found before the first step."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where, self.reason = where, reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class NoRunError(RootError):
    """There is no run at that place."""


class UnsupportedFormatError(RootError):
    """The root was written by a format version this package does not read."""


class DestinationError(RootError):
    """A copy of a checkpoint cannot go there: the place holds another run, or a checkpoint of that step or later."""


class RunBusyError(RootError):
    """Another live process on this host is writing the same run."""


# --- state ----------------------------------------------------------------------------------------


class StateError(DcpsvcError):
    """Something in the state cannot be saved or loaded as declared."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class UnsupportedStateError(StateError):
    """An object that is neither a tensor nor JSON-like; nothing is pickled, so it is refused."""


class SharingError(StateError):
    """A declaration of who holds what that this rank, or another component of the state, contradicts."""


class StateMismatchError(StateError):
    """The checkpoint and the state in memory do not fit; nothing in memory was changed."""


class StructureMismatchError(StateMismatchError):
    """Keys, shapes or dtypes of the checkpoint and the state differ. The reason is a table of all differences."""


class TornSnapshotError(StateError):
    """A tensor was changed while it was being copied; what was copied is never published."""


# --- save -----------------------------------------------------------------------------------------


class SaveError(DcpsvcError):
    """One attempt to save one step did not become a checkpoint."""

    def __init__(self, step: int, attempt: str, newest: int | None) -> None:
        super().__init__(step, attempt, newest)
        self.step, self.attempt, self.newest = step, attempt, newest

    @property
    def intact(self) -> str:
        """What a restart would resume from."""
        if self.newest is None:
            return "no checkpoint is committed yet"
        return f"step {self.newest} remains the newest commit"

    def __str__(self) -> str:
        return f"step {self.step} (attempt {self.attempt}) was not committed; {self.intact}"


class SaveFailedError(SaveError):
    """Ranks failed, or disagreed about what to save. The same error is raised on every rank."""

    def __init__(self, step: int, attempt: str, newest: int | None, failures: tuple[RankFailure, ...]) -> None:
        super().__init__(step, attempt, newest)
        self.failures = failures
        self.args = (step, attempt, newest, failures)

    def __str__(self) -> str:
        return f"step {self.step} (attempt {self.attempt}): {'; '.join(map(str, self.failures))}; {self.intact}"


class RanksMissingError(SaveError):
    """Some ranks did not arrive before the deadline."""

    def __init__(
        self,
        step: int,
        attempt: str,
        newest: int | None,
        phase: str,
        missing: tuple[int, ...],
        present: tuple[int, ...],
        waited_s: float,
        note: str = "",
    ) -> None:
        super().__init__(step, attempt, newest)
        self.phase, self.missing, self.present = phase, missing, present
        self.waited_s, self.note = waited_s, note
        self.args = (step, attempt, newest, phase, missing, present, waited_s, note)

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return (
            f"step {self.step} (attempt {self.attempt}): ranks {self.missing} did not arrive in {self.phase} "
            f"within {self.waited_s:.1f} s, ranks {self.present} did{note}; {self.intact}"
        )


class FencedError(SaveError):
    """A newer job has taken the run root over: nothing that this one saves will count. The same on every rank."""

    def __init__(self, step: int, attempt: str, newest: int | None, reason: str) -> None:
        super().__init__(step, attempt, newest)
        self.reason = reason
        self.args = (step, attempt, newest, reason)

    def __str__(self) -> str:
        return (
            f"step {self.step} (attempt {self.attempt}) is refused: {self.reason}; end this job; "
            f"{self.intact} as far as it knows"
        )


class SaveSkippedError(SaveError):
    """Saves come faster than they can be stored, and ``backpressure`` says to leave some out. Alike on every rank."""

    def __init__(self, step: int, attempt: str, newest: int | None, reason: str) -> None:
        super().__init__(step, attempt, newest)
        self.reason = reason
        self.args = (step, attempt, newest, reason)

    def __str__(self) -> str:
        return f"step {self.step} (attempt {self.attempt}) is left out: {self.reason}; {self.intact}"


class CommitUnknownError(SaveError):
    """Nobody knows whether the manifest was written; only a listing of the run root can tell."""

    def __init__(self, step: int, attempt: str, newest: int | None, reason: str) -> None:
        super().__init__(step, attempt, newest)
        self.reason = reason
        self.args = (step, attempt, newest, reason)

    def __str__(self) -> str:
        return (
            f"step {self.step} (attempt {self.attempt}): not known to be committed ({self.reason}); "
            f"list the run root to know; {self.intact} as far as this rank knows"
        )


class StepExistsError(SaveError):
    """The step is already committed; a checkpoint is never overwritten."""

    def __str__(self) -> str:
        return (
            f"step {self.step} is already committed (attempt {self.attempt}) and is never overwritten; "
            f"resume from the newest commit (step {self.newest}), or use another run root"
        )


# --- restore --------------------------------------------------------------------------------------


_STEPS_TOLD = 20
"""More of them do not help anybody who has mistyped one."""


class RestoreError(DcpsvcError):
    """A checkpoint cannot be read back; the state in memory is untouched unless the text says otherwise."""


class NoSuchStepError(RestoreError):
    """An explicitly named step that is not committed. Never a fresh start.

    ``attempts`` are those of the step, where it is the attempt that is not there.
    """

    def __init__(
        self, root: str, step: int, available: tuple[int, ...], reason: str = "", attempts: tuple[str, ...] = ()
    ) -> None:
        super().__init__(root, step, available, reason, attempts)
        self.root, self.step, self.available, self.reason, self.attempts = root, step, available, reason, attempts

    def __str__(self) -> str:
        if self.attempts:
            return f"{self.root}: step {self.step} {self.reason}; its attempts are {', '.join(self.attempts)}"
        why = f"cannot be loaded ({self.reason})" if self.reason else "is not committed"
        return f"{self.root}: step {self.step} {why}; {self.intact}"

    @property
    def intact(self) -> str:
        """What is there instead; of many steps those around this one, the first and the last."""
        steps = self.available
        if len(steps) <= _STEPS_TOLD:
            return f"committed steps: {', '.join(map(str, steps))}" if steps else "nothing is committed"
        around = [*[one for one in steps if one < self.step][-2:], *[one for one in steps if one > self.step][:2]]
        return f"{len(steps)} steps are committed, {steps[0]} to {steps[-1]}; next to it {', '.join(map(str, around))}"


class StepDeletedError(NoSuchStepError):
    """The step is being deleted, or was deleted while it was read: by the policy of its job, or by ``dcpsvc gc``.

    Nothing is damaged. ``under_way``: the deletion has not come to its end, or was broken off. ``left_nbytes`` are what
    is left of its files, of no use to anybody.
    """

    def __init__(
        self,
        root: str,
        step: int,
        available: tuple[int, ...],
        attempt: str,
        under_way: bool = False,  # noqa: FBT001, FBT002 - positional: that is how an error pickles
        left_nbytes: int = 0,
    ) -> None:
        super().__init__(root, step, available)
        self.attempt, self.under_way, self.left_nbytes = attempt, under_way, left_nbytes
        self.args = (root, step, available, attempt, under_way, left_nbytes)

    def __str__(self) -> str:
        what = "is being deleted" if self.under_way else "was deleted meanwhile"
        left = f"{self.left_nbytes:,} bytes of its files are left" if self.left_nbytes else "nothing of it is left"
        who = "by the policy of its job, or by dcpsvc gc"
        return f"{self.root}: step {self.step} (attempt {self.attempt}) {what} {who}; {left}; {self.intact}"


class NoValidCheckpointError(RestoreError):
    """Commits exist and every one of them is damaged. A fresh start must be asked for by name."""

    def __init__(self, root: str, rejected: tuple[str, ...]) -> None:
        super().__init__(root, rejected)
        self.root, self.rejected = root, rejected

    def __str__(self) -> str:
        return f"{self.root}: no commit can be loaded: {'; '.join(self.rejected)}"


class RestoreFailedError(RestoreError):
    """Some rank could not take part in the restore. The same error is raised on every rank.

    ``changed`` says whether the state in memory may have been touched.
    """

    def __init__(
        self,
        where: str,
        failures: tuple[RankFailure, ...],
        missing: tuple[int, ...] = (),
        changed: bool = False,  # noqa: FBT001, FBT002 - positional: that is how an error pickles
    ) -> None:
        super().__init__(where, failures, missing, changed)
        self.where, self.failures, self.missing, self.changed = where, failures, missing, changed

    def __str__(self) -> str:
        parts = [str(f) for f in self.failures]
        if self.missing:
            parts.append(f"ranks {self.missing} did not arrive")
        intact = "nothing in memory was changed"
        parts.append("the state in memory may be partly changed: do not train on" if self.changed else intact)
        return f"{self.where}: {'; '.join(parts)}"


class CheckpointGoneError(DcpsvcError):
    """Metrics or a pin for a checkpoint that is not there, or is being deleted. Nothing was written that stays."""

    def __init__(self, where: str, step: int, reason: str) -> None:
        super().__init__(where, step, reason)
        self.where, self.step, self.reason = where, step, reason

    def __str__(self) -> str:
        return f"{self.where}: nothing is noted for step {self.step}: {self.reason}"


class RemovalRefusedError(DcpsvcError):
    """A checkpoint must not be deleted: it is the last one, pinned, or another one needs its files. Nothing was."""

    def __init__(self, where: str, step: int, reason: str) -> None:
        super().__init__(where, step, reason)
        self.where, self.step, self.reason = where, step, reason

    def __str__(self) -> str:
        return f"{self.where}: step {self.step} is not deleted: it {self.reason}; nothing was deleted"


class ExportError(DcpsvcError):
    """A checkpoint cannot be written in a foreign format: the place is not empty, or something is not in it."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where, self.reason = where, reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class ForeignFormatError(DcpsvcError):
    """What another library wrote cannot be taken: it is damaged, or would have to be executed to be read."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where, self.reason = where, reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


# --- format ---------------------------------------------------------------------------------------


class FormatError(DcpsvcError):
    """A file of ours that does not say what it should."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class ManifestError(FormatError):
    """Not a valid manifest, so not a checkpoint."""


class LayoutError(FormatError):
    """Not a valid layout."""


class CorruptShardError(FormatError):
    """Bytes of a shard that are missing or do not match their checksum."""


# --- store ----------------------------------------------------------------------------------------


class StoreError(DcpsvcError):
    """The store said no. ``where`` is a key or URL without credentials."""

    transient = False
    """Whether the same call may succeed later."""

    def __init__(self, operation: str, where: str, reason: str) -> None:
        super().__init__(operation, where, reason)
        self.operation, self.where, self.reason = operation, where, reason

    def __str__(self) -> str:
        return f"{self.operation} {self.where}: {self.reason}"


class StoreNotFoundError(StoreError):
    """No object under that key."""


class StoreObjectError(StoreError):
    """What lies under that key is no object of ours: too large, too short, no regular file."""


class StoreAccessError(StoreError):
    """Credentials or permissions do not allow it."""


class StoreFullError(StoreError):
    """No space left."""


class StoreUnavailableError(StoreError):
    """A passing condition: throttled, reset, timed out."""

    transient = True


class StoreThrottledError(StoreUnavailableError):
    """The server asks for fewer requests."""
