"""Random histories of a run root, compared with plain sorting after each action; alone, it says what was tried.

python -m tests.unit.histories --histories 500
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections import Counter
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dcpsvc import choosing, keeping, sidefiles
from dcpsvc.format.layout import Layout
from dcpsvc.policies import Best, EveryNSteps, Keep, Latest
from dcpsvc.sidefiles import Lease, SideFiles
from dcpsvc.stages import discover
from dcpsvc.tools import surgery
from tests.unit.one_rank import Mortal, OneRank
from tests.unit.turns import RUN_ID, Killed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dcpsvc.format.keys import Attempt

LOSSES = st.sampled_from([0.0, -0.0, -1.0, 2.0, 2.5, 2.0, math.nan, math.inf, -math.inf, None])
TAGS = st.sampled_from([False, False, False, True])
POLICIES = st.tuples(st.integers(1, 3), st.integers(0, 2), st.sampled_from(["min", "max"]), st.sampled_from([0, 0, 7]))
TALLY, STATES = Counter[str](), set[tuple[object, ...]]()
"""What the histories of this process did, and the states of a run root that they came through."""


def age(attempt: Attempt) -> tuple[int, int]:
    """Step, then the start that made it."""
    return attempt.step, attempt.epoch.number


class History(RuleBasedStateMachine):
    """Starts, saves, edits, late metrics, tags, pins, readers and crashes."""

    @initialize(policy=POLICIES)
    def begin(self, policy: tuple[int, int, str, int]) -> None:
        self.policy = self.n, self.k, self.mode, self.multiple = policy
        keep: Keep = Latest(self.n)
        if self.k:
            keep |= Best(self.k, "loss", self.mode)
        if self.multiple:
            keep |= EveryNSteps(self.multiple)
        self.keep = keep
        self.root, self.disk = Mortal("root"), Mortal("disk")
        self.step = 0
        self.losses: dict[Attempt, float | None] = {}
        self.diverged: set[Attempt] = set()
        self.pinned: set[Attempt] = set()
        self.leases: dict[Attempt, Lease] = {}
        self.alive: set[Attempt] = set()
        TALLY["histories"] += 1
        self.start()

    def start(self) -> None:
        """A new start on the same disk, and perhaps it resumes."""
        self.root.calls_left = None
        self.job = OneRank(self.root, self.disk, keep=self.keep)
        self.resumed: Attempt | None = None
        TALLY["starts"] += 1

    def expected(self) -> set[Attempt]:
        """By plain sorting."""
        everything = sorted(self.alive, key=age)
        last = [one for one in {one.step: one for one in everything}.values() if one not in self.diverged]
        stay = {*last[-self.n :], *self.best(last), *everything[-1:]}
        stay |= {one for one in last if self.multiple and one.step % self.multiple == 0}
        stay |= {*[one for one in everything if one not in self.diverged][-1:]}
        stay |= self.alive & {*self.pinned, *self.leases, self.resumed}
        steps = {one.step for one in stay}
        return {one for one in everything if one.step in steps}

    def best(self, candidates: Iterable[Attempt]) -> list[Attempt]:
        """Of the last attempts of steps."""
        values = {one: loss for one in candidates if (loss := self.losses[one]) is not None and math.isfinite(loss)}
        sign = 1 if self.mode == "min" else -1
        return sorted(values, key=lambda one: (sign * values[one], age(one)))[: self.k]

    def drawn(self, data: st.DataObject, among: Iterable[Attempt]) -> Attempt:
        """One of them."""
        return data.draw(st.sampled_from(sorted(among, key=age)))

    def committed(self, gap: int, loss: float | None, *, diverged: bool) -> Attempt:
        self.step += gap
        metrics = {} if loss is None else {"loss": loss}
        attempt = self.job.commit(self.step, **metrics, **({"diverged": 1.0} if diverged else {}))
        self.note(attempt, loss, diverged=diverged)
        TALLY["commits"] += 1
        return attempt

    def note(self, attempt: Attempt, loss: float | None, *, diverged: bool) -> None:
        """It is there, and what is known of it."""
        self.losses[attempt] = loss
        self.alive.add(attempt)
        if diverged:
            self.diverged.add(attempt)

    @rule(gap=st.integers(1, 5), loss=LOSSES, diverged=TAGS)
    def save(self, gap: int, loss: float | None, diverged: bool) -> None:  # noqa: FBT001 - hypothesis draws it
        attempt = self.committed(gap, loss, diverged=diverged)
        told = self.job.retain(attempt)
        assert len(told) == 1, told
        assert "removed" in told[0]
        before, self.alive = self.alive, self.expected()
        assert set(discover.committed(self.root)) == self.alive
        TALLY["deletions"] += len(before - self.alive)

    @rule(gap=st.integers(1, 5), loss=LOSSES, calls=st.integers(0, 30), restart_calls=st.none() | st.integers(0, 20))
    def save_and_crash(self, gap: int, loss: float | None, calls: int, restart_calls: int | None) -> None:
        attempt = self.committed(gap, loss, diverged=False)
        must_stay = self.expected()
        self.root.calls_left = calls
        try:
            self.job.retain(attempt)
        except Killed:
            TALLY["killed while deleting"] += 1
        self.root.calls_left = restart_calls
        try:
            OneRank(self.root, self.disk, keep=self.keep)
        except Killed:
            TALLY["killed again while starting"] += 1
        self.root.calls_left = None
        before, self.alive = self.alive, set(discover.committed(self.root)) & self.alive
        assert must_stay <= self.alive, "the crash cost a checkpoint"
        TALLY["deletions"] += len(before - self.alive)
        self.start()

    @rule(data=st.data())
    @precondition(lambda self: self.alive)
    def edit(self, data: st.DataObject) -> None:
        """By ``dcpsvc edit``, between two starts."""
        source = self.drawn(data, self.alive)
        operation = surgery.Operation(source=self.root, manifest=discover.read_manifest(self.root, source))
        plan = surgery._Plan([None], [b"{}"], Layout({}, {}), (), None)  # type: ignore[list-item] - no tensors to read
        made = surgery._commit(operation, plan, self.root, RUN_ID, lambda _: None).manifest.key
        self.note(made, self.losses[source], diverged=source in self.diverged)
        TALLY["edits"] += 1
        self.start()

    @rule(loss=LOSSES.filter(lambda loss: loss is not None), data=st.data())
    @precondition(lambda self: self.alive)
    def record_late(self, loss: float, data: st.DataObject) -> None:
        attempt = self.drawn(data, self.alive)
        sidefiles.record(self.root, attempt, {"loss": loss})
        self.losses[attempt] = loss
        TALLY["late metrics"] += 1

    @rule(diverged=st.booleans(), data=st.data())
    @precondition(lambda self: self.alive)
    def tag_late(self, diverged: bool, data: st.DataObject) -> None:  # noqa: FBT001 - hypothesis draws it
        attempt = self.drawn(data, self.alive)
        sidefiles.record(self.root, attempt, {"diverged": float(diverged)})
        (self.diverged.add if diverged else self.diverged.discard)(attempt)
        TALLY["divergence tags"] += 1

    @rule(data=st.data())
    @precondition(lambda self: self.alive)
    def pin(self, data: st.DataObject) -> None:
        attempt = self.drawn(data, self.alive)
        sidefiles.pin(self.root, attempt)
        self.pinned.add(attempt)
        TALLY["pins"] += 1

    @rule(data=st.data())
    @precondition(lambda self: self.pinned & self.alive)
    def unpin(self, data: st.DataObject) -> None:
        step = self.drawn(data, self.pinned & self.alive).step
        sidefiles.unpin_step(self.root, step)
        self.pinned = {one for one in self.pinned if one.step != step}

    @rule(data=st.data())
    @precondition(lambda self: self.alive - self.leases.keys())
    def begin_to_read(self, data: st.DataObject) -> None:
        attempt = self.drawn(data, self.alive - self.leases.keys())
        self.leases[attempt] = Lease(self.root, 3600.0)
        self.leases[attempt].take(attempt)
        TALLY["leases"] += 1

    @rule(data=st.data())
    @precondition(lambda self: self.leases)
    def end_reading(self, data: st.DataObject) -> None:
        self.leases.pop(self.drawn(data, self.leases)).release()

    @rule(data=st.data())
    @precondition(lambda self: self.alive)
    def restart_and_resume(self, data: st.DataObject) -> None:
        self.start()
        step = data.draw(st.none() | st.sampled_from(sorted({one.step for one in self.alive})))
        able = {one for one in self.alive if (one not in self.diverged if step is None else one.step == step)}
        found = choosing.choose(self.root, step).found
        assert (None if found is None else found.manifest.key) == max(able, key=age, default=None)
        if found is not None:
            self.job.catalog.hold(found.manifest.key)
            self.resumed = found.manifest.key
            TALLY["resumes"] += 1

    @invariant()
    def what_is_there_is_whole_and_of_what_is_gone_nothing_is_left(self) -> None:
        if not hasattr(self, "root"):
            return
        assert set(discover.committed(self.root)) == self.alive
        for attempt in self.alive:
            assert discover.valid(self.root, attempt)
        gone = [str(attempt) for attempt in self.losses if attempt not in self.alive]
        rest = [key for key in self.root.objects if any(name in key for name in gone)]
        assert rest == [], "debris outlived a start"
        TALLY["actions"] += 1
        STATES.add(self.state())

    @invariant()
    def a_stranger_reads_the_same_as_the_job_decided(self) -> None:
        if not hasattr(self, "root") or not self.alive:
            return
        notes = SideFiles(self.root)
        plan = keeping.plan(self.root, discover.look(self.root, notes), notes, self.keep, now_s=time.time())
        resumed, self.resumed = self.resumed, None  # which only the job knows
        assert plan.keep.keys() == self.expected()
        self.resumed = resumed

    def state(self) -> tuple[object, ...]:
        """What a policy may look at, without the numbers of steps and starts."""
        ordered = sorted(self.alive, key=age)
        steps = list(dict.fromkeys(one.step for one in ordered))
        best = self.best(ordered)
        notes = (self.diverged, self.pinned, self.leases, {self.resumed})
        return self.policy, *(
            (steps.index(one.step), best.index(one) if one in best else -1, *(one in noted for noted in notes))
            for one in ordered
        )


def main() -> None:
    """Try so many, and say what was tried."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--histories", type=int, default=500)
    made.add_argument("--actions", type=int, default=25, help="of each, at most")
    given = made.parse_args()
    logging.getLogger("dcpsvc").setLevel(logging.ERROR)  # a policy remarks on metrics that are missing
    tried = settings(max_examples=given.histories, stateful_step_count=given.actions, deadline=None, database=None)
    run_state_machine_as_test(History, settings=tried)
    for name, count in (*TALLY.most_common(), ("different states", len(STATES))):
        print(f"{count:>8,}  {name}")


if __name__ == "__main__":
    main()
