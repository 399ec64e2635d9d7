"""Attempts to save that did not become checkpoints."""

from __future__ import annotations

from dcpsvc.errors.service import DcpsvcError, RankFailure


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
