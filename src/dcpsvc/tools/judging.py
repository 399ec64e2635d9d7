"""What a drill showed, as a verdict: a pure function of what was seen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


def at_least(step: int | None, wanted: int | None) -> bool:
    """Whether there is such a step, and it is no earlier one."""
    return step is not None and wanted is not None and step >= wanted


class Finding(NamedTuple):
    """Something that went wrong, and what to do about it."""

    problem: str
    remedy: str


@dataclass(slots=True, kw_only=True)
class Course:
    """What was seen of a job before and after the signal. Seconds count from the signal.

    Attributes:
        asked_root: The run root that was named; None if none was.
        wanted_steps: How many were to be made before the signal.
        waited_s: How long the job was given for them.
        grace_s: How long it was given to end.
        root: The run root, as the job says.
        steps: Made before the signal.
        signal: Its name.
        target: Who got it; empty if it was not sent.
        step_at_signal: Last complete step of the ranks here, when it was sent.
        stop_step: After which the ranks agreed to stop.
        last_step: The last one that was seen to be complete.
        phase: Of the save that was in flight when the job was last seen.
        agreed_s: Until they had agreed.
        staged_s: Until a save of that step, or a later one, had begun.
        local_s: Until it was on the local tier of every rank.
        committed_s: Until it was committed.
        ended_s: Until every process had ended; None if they were killed.
        exit_code: Of the command.
        newest: Newest commit at the run root afterwards.
        newest_local: Newest checkpoint that is complete on the local tiers, afterwards.
    """

    asked_root: str | None
    wanted_steps: int
    waited_s: float
    grace_s: float
    signal: str
    root: str = ""
    steps: int | None = None
    target: str = ""
    step_at_signal: int | None = None
    stop_step: int | None = None
    last_step: int | None = None
    phase: str = ""
    agreed_s: float | None = None
    staged_s: float | None = None
    local_s: float | None = None
    committed_s: float | None = None
    ended_s: float | None = None
    exit_code: int | None = None
    newest: int | None = None
    newest_local: int | None = None

    @property
    def committed(self) -> bool:
        """Whether nothing before the signal is lost: the run root has that step, or a later one."""
        return at_least(self.newest, self.step_at_signal)

    @property
    def recoverable(self) -> bool:
        """Whether the next start on these disks finds that step, or a later one."""
        return at_least(self.newest_local, self.step_at_signal)

    @property
    def ignored(self) -> bool:
        """Whether a step was made after the one at which all were to stop."""
        return self.stop_step is not None and self.last_step is not None and self.last_step > self.stop_step


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the job would survive.

    Attributes:
        course: What was seen.
        findings: Why not; empty if it would.
        note: What else there is to know.
    """

    course: Course
    findings: tuple[Finding, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing went wrong."""
        return not self.findings

    def document(self) -> dict[str, Any]:
        """Everything as JSON-like values."""
        findings = [finding._asdict() for finding in self.findings]
        return {"passed": self.passed, "findings": findings, "note": self.note} | asdict(self.course)


def judge(seen: Course) -> Verdict:
    """Say what the drill showed."""
    if not seen.target:
        return Verdict(seen, (_not_begun(seen),))
    findings: list[Finding] = []
    if seen.ignored:
        findings.append(_IGNORED)
    elif seen.ended_s is None and seen.stop_step is None:
        findings.append(_unnoticed(seen))
    elif seen.ended_s is None and seen.committed:
        findings.append(_lingering(seen))
    if not seen.committed and not seen.recoverable:
        findings.append(_lost(seen))
    return Verdict(seen, tuple(findings), "" if findings else _note(seen))


_IGNORED = Finding(
    "the loop never looked at should_stop",
    "if ckpt.step(step, ...).should_stop: break",
)


def _not_begun(seen: Course) -> Finding:
    if seen.steps is None:
        asked = f"no Checkpointer of {seen.asked_root} was found" if seen.asked_root else "no Checkpointer was found"
        remedy = "is ROOT right?" if seen.asked_root else "does the command make one on this host? else give --root"
        return Finding(f"{asked}{_end(seen)}", remedy)
    made = f"{seen.steps} of {seen.wanted_steps} steps were seen{_end(seen)}"
    return Finding(made, "let the script make more steps, or give a smaller --after-step or a longer --start")


def _end(seen: Course) -> str:
    if seen.exit_code is None:
        return f" within {seen.waited_s:.0f} s"
    return f" before the command ended with exit code {seen.exit_code}"


def _unnoticed(seen: Course) -> Finding:
    return Finding(
        f"{seen.signal} was not noticed within {seen.grace_s:.0f} s",
        "make the Checkpointer after whatever else handles signals; do not replace its handler",
    )


def _lingering(seen: Course) -> Finding:
    return Finding(
        f"committed, and still running {seen.grace_s:.0f} s after the signal",
        "what comes after the loop takes too long: leave it out when should_stop is set",
    )


def _lost(seen: Course) -> Finding:
    """Nothing keeps the step at the signal: say how far it came."""
    lost = f"steps {'1' if seen.newest is None else seen.newest + 1} to {seen.last_step} are lost"
    if seen.ended_s is not None and seen.stop_step is None:
        return Finding(
            f"{seen.signal} ended the job without a save: {lost}",
            "make the Checkpointer before the loop and after whatever else handles signals",
        )
    if seen.ended_s is not None:
        return Finding(f"the job stopped, and its save failed: {lost}", "the SaveError in its output says why")
    where = f" in {seen.phase}" if seen.phase else ""
    return Finding(
        f"killed after {seen.grace_s:.0f} s{where}, before the save was on the local disks: {lost}",
        "a faster local=, shorter steps, or a longer grace",
    )


def _note(seen: Course) -> str:
    if seen.committed:
        return ""
    ended = f"killed after {seen.grace_s:.0f} s" if seen.ended_s is None else f"ended after {seen.ended_s:.1f} s"
    return f"{ended}: upload is longer than the grace: it will be finished at the next start on this disk"
