"""Checkpoints that cannot be read back, noted about, deleted, or brought into or out of another format."""

from __future__ import annotations

from dcpsvc.errors.service import DcpsvcError, RankFailure

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
    """The step is being deleted, or was deleted: while it was read, or by the start of this job.

    Nothing is damaged. ``under_way``: the deletion has not come to its end, or was broken off. ``left_nbytes`` are what
    is left of its files, of no use to anybody. ``was_committed``: it is known to have been; else it may as well be what
    a save that failed has left.
    """

    def __init__(
        self,
        root: str,
        step: int,
        available: tuple[int, ...],
        attempt: str,
        under_way: bool = False,  # noqa: FBT001, FBT002 - positional: that is how an error pickles
        left_nbytes: int = 0,
        was_committed: bool = True,  # noqa: FBT001, FBT002 - likewise
    ) -> None:
        super().__init__(root, step, available)
        self.attempt, self.under_way, self.left_nbytes = attempt, under_way, left_nbytes
        self.was_committed = was_committed
        self.args = (root, step, available, attempt, under_way, left_nbytes, was_committed)

    def __str__(self) -> str:
        what = "is being deleted" if self.under_way else "was deleted meanwhile"
        what = what if self.was_committed else f"was never committed, or {what}"
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
