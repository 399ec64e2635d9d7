"""Jobs that live through faults side by side, and the laws that hold for each fault."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tests.ranks.faults import record
from tests.ranks.harness import Job, Outcome, Raised, run_jobs, values
from tests.ranks.rounds import Fault, Round, does_not_save, saves_another_step, victim_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

ROLES = ("coordinator", "other")
FAILED, MISSING, UNKNOWN = ("SaveFailedError",), ("RanksMissingError",), ("CommitUnknownError",)

SLACK_S = 8.0
"""For a busy machine; what is measured goes into the table."""


@dataclass(frozen=True, kw_only=True)
class Life:
    """A job that lives through some faults on one rank.

    Attributes:
        role: Of that rank.
        faults: By name, in order.
        world: Ranks.
        own_disk: Entered with the folder of that rank's disk before the job begins.
    """

    role: str
    faults: dict[str, Fault]
    world: int
    own_disk: Callable[[Path], AbstractContextManager[Any]] = lambda _: contextlib.nullcontext()

    @property
    def victim(self) -> int:
        """The rank at fault."""
        return victim_of(self.role, self.world)

    def in_parts(self, count: int) -> list[Life]:
        """Several jobs that share the faults out."""
        names = [list(self.faults)[begin::count] for begin in range(count)]
        return [replace(self, faults={name: self.faults[name] for name in part}) for part in names]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What became of one fault.

    Attributes:
        name: Of the fault.
        life: Of which it is a part.
        seen: By rank.
    """

    name: str
    life: Life
    seen: list[Round]

    @property
    def fault(self) -> Fault:
        """What went wrong."""
        return self.life.faults[self.name]

    @property
    def mine(self) -> Round:
        """What the rank at fault saw."""
        return self.seen[self.life.victim]

    @property
    def others(self) -> list[Round]:
        """What the ranks beside it saw."""
        return [found for found in self.seen if found is not self.mine]

    @property
    def error(self) -> Raised | None:
        """What the ranks beside the one at fault heard; None: the save was committed."""
        return self.others[0].error

    @property
    def seconds(self) -> float:
        """From the fault to the error of the last rank that was not itself stopped."""
        live = self.others if self.fault.stops else self.seen
        return max(found.heard for found in live) - (self.mine.struck or min(found.began for found in live))


@dataclass(frozen=True)
class Lived:
    """What became of jobs that lived side by side."""

    lives: list[Life]
    outcomes: list[list[Outcome]]

    def case(self, role: str, name: str) -> Case:
        """What became of one fault; fails if its job did not come to its end."""
        number = next(n for n, life in enumerate(self.lives) if life.role == role and name in life.faults)
        found = [found[name] for found, *_ in values(causes_first(self.outcomes[number]))]
        return Case(name=name, life=self.lives[number], seen=found)

    @property
    def names(self) -> set[str]:
        """Of all faults."""
        return {name for life in self.lives for name in life.faults}

    def ends(self) -> list[tuple[Raised | None, list[str]]]:
        """How each rank ended: what its ``close()`` raised, and which threads of ours were left."""
        ended = [values(causes_first(outcomes)) for outcomes in self.outcomes]
        return [(closing, threads) for results in ended for _, closing, threads in results]


def side_by_side(function: Callable[..., Any], lives: list[Life], folder: Path, *, timeout_s: float = 180.0) -> Lived:
    """Live these lives at the same time.

    Args:
        function: Called by each rank with rank, world size, folder of its job, role and names of the faults: it finds
            them (they do not pickle) and calls :func:`live_through`.
        lives: Faults on the same role have different names.
        folder: For all of them.
        timeout_s: For all of them.
    """
    with contextlib.ExitStack() as stack:
        jobs: list[Job] = []
        for number, life in enumerate(lives):
            place = folder / str(number)
            place.mkdir()
            stack.enter_context(life.own_disk(place / f"node-{life.victim}"))
            jobs.append(Job(life.world, function, (place, life.role, tuple(life.faults))))
        return Lived(lives, run_jobs(jobs, timeout_s=timeout_s))


def causes_first(outcomes: list[Outcome]) -> list[Outcome]:
    """Who only missed another rank is not what the test wants to tell."""
    return sorted(outcomes, key=lambda outcome: outcome.raised is not None and outcome.raised.type == "PeerDiedError")


# --- what holds for all of them --------------------------------------------------------------------------


def content(error: Raised | None) -> Any:
    """What an error says, but for how long this rank waited."""
    return error and (error.type, sorted((k, repr(v)) for k, v in error.attributes.items() if k != "waited_s"))


def assert_the_laws_hold(case: Case) -> None:
    """All hear the same, in time; nothing is published, nothing leaks, and the next save is committed.

    Writes a line of the table, whatever comes of it.
    """
    about = {"fault": case.name, "role": case.life.role, "world": case.life.world, "result": "fail"}
    kind = case.error.type if case.error else "committed"
    about |= {"error": kind, "seconds": round(case.seconds, 2), "deadline_s": case.fault.deadline_s}
    try:
        _assert_the_same_is_heard(case)
        assert case.error is None or case.seconds < case.fault.deadline_s + SLACK_S
        _assert_nothing_is_published(case)
        _assert_all_goes_on(case)
        assert [found.left for found in case.seen] == [[]] * len(case.seen)
        assert [found.leaked for found in case.seen] == [{}] * len(case.seen)
        about["result"] = "pass"
    finally:
        record("DCPSVC_FAULT_TABLE", **about)


def _assert_the_same_is_heard(case: Case) -> None:
    theirs, mine = case.error, case.mine.error
    assert (theirs and theirs.type) in (case.fault.hears or (None,)), theirs and theirs.text
    assert len({repr(content(found.error)) for found in case.others}) == 1, [found.error for found in case.others]
    if case.fault.calls is does_not_save:
        assert all(found.returned_pending for found in case.others), "save() waited for a peer"
    elif case.fault.calls is saves_another_step:
        assert mine is not None
        expected = [rank for rank in range(len(case.seen)) if rank != case.life.victim]
        assert (mine.type, mine["missing"]) == (*MISSING, expected)
    elif case.fault.alone:
        assert mine is not None
        assert mine.type == case.fault.alone
    else:
        assert content(mine) == content(theirs), (mine, theirs)
    if theirs is not None:
        _assert_it_says_everything(case, theirs, case.others[0].step)


def _assert_it_says_everything(case: Case, error: Raised, step: int) -> None:
    assert "SaveError" in error.family
    assert (error["step"], error["newest"]) == (step, step - 1)
    assert f"step {step} (attempt {error['attempt']})" in error.text
    assert f"step {step - 1} remains the newest commit" in error.text
    victim = case.life.victim
    if error.type == "RanksMissingError":
        assert list(error["missing"]) == [victim], error.text
        assert list(error["present"]) == [rank for rank in range(len(case.seen)) if rank != victim]
        assert f"ranks ({victim},) did not arrive in {error['phase']}" in error.text
    elif error.type == "SaveFailedError":
        (failure, *_) = error["failures"]
        phase, kinds = case.fault.blames or (failure["phase"], (failure["error"],))
        assert (failure["rank"], failure["phase"]) == (victim, phase), error.text
        assert failure["error"] in kinds, error.text
        assert f"rank {victim} failed in {phase}" in error.text


def _assert_nothing_is_published(case: Case) -> None:
    for found in case.seen:
        assert found.step - 1 in found.then
        if case.error is None or case.error.type != "CommitUnknownError":
            assert (found.step in found.then) == (case.error is None)


def _assert_all_goes_on(case: Case) -> None:
    failed = case.error is not None
    for found in case.seen:
        assert found.trained
        assert found.afterwards is None, found.afterwards
        assert found.committed[-1] == found.step + 1
        missed = found is case.mine and case.fault.calls is does_not_save
        assert found.counted == (2 - failed, int(failed and not missed))
