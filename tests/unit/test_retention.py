"""R11-R14: what retention deletes at a run root, in any history, with a crash before any of its calls."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dcpsvc import choosing, keeping, sidefiles
from dcpsvc.catalog import Catalog
from dcpsvc.config import Options
from dcpsvc.errors import RankFailure, StoreUnavailableError
from dcpsvc.events import Events
from dcpsvc.format import keys
from dcpsvc.pending import PendingSave
from dcpsvc.policies import Best, EveryNSteps, Everything, Keep, Latest
from dcpsvc.retention import Retention
from dcpsvc.save import Save
from dcpsvc.settling import OpenRun, settle
from dcpsvc.sidefiles import SideFiles
from dcpsvc.stages import discover
from dcpsvc.stages.retain import Rate
from dcpsvc.tiers import Tiers
from tests.unit.turns import MEETING, RUN_ID, Killed, Place, manifest, put_shards, solo

if TYPE_CHECKING:
    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Entry

TOKENS = (f"{number:08x}" for number in range(1, 10**6))


class Mortal(Place):
    """A place at which a job dies before its n-th call from now on."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls_left: int | None = None
        self.writes: list[str] = []

    def _count(self) -> None:
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise Killed

    def create(self, key: str, data: bytes) -> bool:
        self._count()
        self.writes.append(f"create {key}")
        return super().create(key, data)

    def delete(self, key: str) -> None:
        self._count()
        self.writes.append(f"delete {key}")
        super().delete(key)

    def get(self, key: str, *, max_nbytes: int) -> bytes:
        self._count()
        return super().get(key, max_nbytes=max_nbytes)

    def list(self, prefix: str) -> list[Entry]:
        self._count()
        return super().list(prefix)

    def size(self, key: str) -> int:
        self._count()
        return super().size(key)


class OneRank:
    """A start of a job of one rank, up to where saves begin; its commits are put there by hand."""

    def __init__(self, root: Place, disk: Place, **options: Any) -> None:
        self.root, self.disk = root, disk
        job = solo(next(TOKENS))
        path = Path("/disk")
        tiers = Tiers(run_id=RUN_ID, remote=root, local=disk, local_path=path)
        self.settled = settle(job, tiers, MEETING)
        run = OpenRun(run_id=RUN_ID, remote=root, local=disk, local_path=path, settled=self.settled)
        self.catalog = Catalog(
            {attempt.step: attempt for attempt in self.settled.committed}, leftovers=set(self.settled.unfinished)
        )
        self.events: list[str] = []
        events = Events(rank=0, observer=lambda event: self.events.append(str(event)))
        self.retention = Retention(job, run, Options(**options), events, self.catalog)
        self.pauses = job.rendezvous.clock

    def commit(self, step: int, *, created: str = "2026-01-31T23:59:59Z", **metrics: float) -> Attempt:
        """A checkpoint of this job is committed; retention has not run yet."""
        attempt = self.settled.epoch.attempt(step, 0)
        found = replace(manifest(attempt), metrics=metrics, created=created)
        for place in (self.root, self.disk):
            place.put(found.layout.path, b'{"format": 1, "aliases": {}, "tensors": {}}')
            put_shards(place, attempt)
            place.put(attempt.manifest, found.dumps())
        self.catalog.add(found)
        return attempt

    def retain(self, attempt: Attempt) -> list[str]:
        """What comes after a commit; says what was told about it."""
        self.events.clear()
        nothing = RankFailure(0, "stage", "Unfinished", "")
        self.retention.run(Save(key=attempt, pending=PendingSave(*attempt), began=0.0, proposal=nothing))
        return [text for text in self.events if "event=retained" in text]

    def save(self, step: int, **metrics: float) -> list[str]:
        return self.retain(self.commit(step, **metrics))


def started(root: Place | None = None, **options: Any) -> OneRank:
    return OneRank(root or Mortal("root"), Mortal("disk"), **options)


def there(place: Place) -> list[int]:
    return [attempt.step for attempt in discover.committed(place)]


# --- by example -----------------------------------------------------------------------------------


def test_a_deletion_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    job = started(keep=Latest(1) | Best(1, "loss", "min"))
    job.save(10, loss=2.0)
    with caplog.at_level(logging.INFO, "dcpsvc"):
        job.save(20, loss=3.0)
        job.save(30, loss=4.0)
    assert there(job.root) == [10, 30]
    (line,) = [record.getMessage() for record in caplog.records if "removed" in record.getMessage()]
    assert "event=retained" in line
    assert "removed step 20: not among the latest 1, not among the best 1 by loss" in line


def test_a_metric_recorded_between_two_commits_protects_its_checkpoint_at_the_next_one() -> None:
    job = started(keep=Latest(2) | Best(1, "eval", "max"))
    first = job.commit(10, eval=0.5)
    job.retain(first)
    second = job.commit(20)
    job.retain(second)
    sidefiles.record(job.root, second, {"eval": 0.9})
    job.save(30)
    assert there(job.root) == [20, 30]
    job.save(40)
    assert there(job.root) == [20, 30, 40]


def test_a_missing_metric_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    job = started(keep=Latest(9) | Best(1, "eval_los", "min"))
    for step in range(1, 5):
        job.save(step, loss=1.0)
    (warning,) = [record.getMessage() for record in caplog.records if "eval_los" in record.getMessage()]
    assert "no checkpoint has 'eval_los'" in warning


def test_without_a_look_at_the_pins_nothing_is_deleted() -> None:
    class Blind(Mortal):
        def list(self, prefix: str) -> list[Entry]:
            if prefix == keys.PINS:
                raise StoreUnavailableError("list", prefix, "503")
            return super().list(prefix)

    job = started(Blind("root"), keep=Latest(1))
    for step in (1, 2, 3):
        told = job.save(step)
    assert there(job.root) == [1, 2, 3]
    assert "incomplete: rank 0 failed in decide: StoreUnavailableError: list pins/: 503" in told[-1]


def test_what_a_deletion_that_broke_off_has_deleted_does_not_count_any_more() -> None:
    class Torn(Mortal):
        broken = False

        def delete(self, key: str) -> None:
            if self.broken and key.startswith("data/"):
                raise StoreUnavailableError("delete", key, "503")
            super().delete(key)

    root = Torn("root")
    job = started(root, keep=Latest(1) | Best(1, "loss", "min"))
    job.save(1, loss=3.0)
    best = job.commit(2, loss=1.0)
    root.broken = True
    assert "503" in job.retain(best)[-1]
    assert there(root) == [2], "its manifest is gone, so it is no checkpoint"
    job.save(3, loss=4.0)
    root.broken = False
    sidefiles.record(root, best, {"loss": 9.0})
    job.save(4, loss=5.0)
    assert there(root) == [3, 4]
    job.save(5, loss=6.0)
    assert there(root) == [3, 5]
    assert {keys.attempt_of(key).step for key in root.below("data/")} == {3, 5}, "and what it has left goes"
    assert root.below(keys.TOMBSTONES) == []


def test_a_checkpoint_that_is_pinned_or_read_or_resumed_from_outlives_the_policy_and_not_the_pin() -> None:
    job = started(keep=Latest(1))
    pinned, resumed, read, plain = (job.commit(step) for step in (1, 2, 3, 4))
    sidefiles.pin(job.root, pinned, "figure 3")
    job.catalog.hold(resumed)
    lease = sidefiles.Lease(job.root, 60.0)
    lease.take(read)
    job.retain(plain)
    job.save(5)
    assert there(job.root) == [1, 2, 3, 5]
    sidefiles.unpin(job.root, pinned)
    lease.release()
    job.save(6)
    assert there(job.root) == [2, 6]


def test_the_manifest_goes_first_and_the_tombstone_last() -> None:
    root = Mortal("root")
    job = started(root, keep=Latest(1))
    old = job.commit(1, loss=1.0)
    job.retain(old)
    sidefiles.record(root, old, {"eval": 1.0})
    (record,) = root.below(old.metrics)
    new = job.commit(2)
    root.writes.clear()
    job.retain(new)
    assert [write for write in root.writes if str(old) in write] == [
        f"create {old.tombstone}",
        f"delete {old.manifest}",
        f"delete {old.shard(0)}",
        f"delete {record}",
        f"delete {old.lineage}",
        f"delete {old.tombstone}",
    ]


class Slow:
    """A clock that only pauses move on."""

    def __init__(self) -> None:
        self.time_s, self.pauses = 0.0, 0

    def now(self) -> float:
        return self.time_s

    def sleep(self, seconds: float) -> None:
        self.time_s += seconds
        self.pauses += 1


def passed(pace: Rate) -> int:
    """How many deletions a round lets pass."""
    number = 0
    while pace.more():
        number += 1
    return number


def test_deletions_keep_to_their_rate_and_to_the_time_of_a_round() -> None:
    clock = Slow()
    pace = Rate(2.0, clock)  # type: ignore[arg-type]
    pace.begin(10.0)
    assert passed(pace) == 21  # at 0.0, 0.5, ... 10.0
    assert clock.time_s == 10.0
    pace.begin(1.0)
    assert passed(pace) == 2
    unlimited = Rate(None, clock)  # type: ignore[arg-type]
    unlimited.begin(5.0)
    assert all(unlimited.more() for _ in range(1000))
    clock.time_s += 6.0
    assert not unlimited.more()


def test_what_the_time_of_one_round_does_not_suffice_for_goes_in_later_ones() -> None:
    """Six commits with some shards each, and a rate that lets a few objects go after each commit."""
    job = started(keep=Everything())
    for step in range(1, 7):
        put_shards(job.root, job.commit(step), range(5))
    job = started(job.root, keep=Latest(1), deletes_per_s=1.0)
    job.retention._pace = Rate(1.0, Slow())  # type: ignore[arg-type]
    job.retention._pace.begin = lambda _: setattr(job.retention._pace, "_ends", job.retention._pace._clock.now() + 7)
    left: list[int] = []
    for step in range(7, 20):
        job.save(step)
        assert there(job.root)[-1] == step
        left.append(len(job.root.below("data/")))
    assert left[0] > left[2] > left[-1] == 1
    assert job.root.below(keys.TOMBSTONES) == []
    assert there(job.root) == [19]


def test_the_policy_of_each_start_is_recorded_and_those_of_the_last_few_stay() -> None:
    root = Mortal("root")
    for number in range(6):
        job = started(root, keep=Latest(number + 1))
        job.save(number + 1)
    assert keeping.recorded(root)[0] == "Latest(6)"
    assert len(root.below(keys.POLICIES)) == 4
    newest = root.below(keys.POLICIES)[-1]
    root.put(newest, b"{")
    assert keeping.recorded(root)[0] == "Latest(5)"


# --- for a stranger -------------------------------------------------------------------------------


def explained(root: Place, rule: Keep | None = None) -> dict[int, str]:
    notes = SideFiles(root)
    plan = keeping.plan(root, discover.look(root, notes), notes, rule)
    assert not plan.keep.keys() & plan.remove.keys()
    return {key.step: why for key, why in (plan.keep | plan.remove).items()}


def test_a_stranger_is_told_why_each_checkpoint_is_there() -> None:
    job = started(keep=Latest(2) | Best(1, "loss", "min"))
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)):
        job.save(step, loss=loss)
    sidefiles.pin(job.root, job.settled.epoch.attempt(3, 0), "figure 3")
    put_shards(job.root, job.settled.epoch.attempt(9, 0))  # no checkpoint
    assert explained(job.root) == {
        1: "best 1 of 1 by loss (1)",
        3: "latest 2 of 2, pinned: figure 3",
        4: "latest 1 of 2",
    }
    assert explained(job.root, Latest(1)) == {
        1: "not among the latest 1",
        3: "pinned: figure 3",
        4: "latest 1 of 1",
    }


def test_where_no_policy_is_recorded_or_it_is_a_users_own_nothing_is_said_to_go() -> None:
    class Mine(Keep):
        def reasons(self, commits: Any) -> dict[Any, str]:
            return {}

    root = Mortal("root")
    job = started(root, keep=Mine() | Latest(3))
    job.save(1)
    job.save(2)
    assert explained(root) == dict.fromkeys(
        (1, 2), f"the policy {keeping.recorded(root)[0]} is not one of dcpsvc's own"
    )
    for key in root.below(keys.POLICIES):
        root.delete(key)
    assert explained(root) == dict.fromkeys((1, 2), "no policy is recorded")


# --- any history, and a crash before any call -----------------------------------------------------

LOSSES = st.sampled_from([0.0, -0.0, -1.0, 2.0, 2.5, 2.0, math.nan, math.inf, -math.inf, None])
POLICIES = st.builds(
    lambda n, k, mode, multiple: (n, k, mode, multiple),
    st.integers(1, 3),
    st.integers(0, 2),
    st.sampled_from(["min", "max"]),
    st.sampled_from([0, 0, 7]),
)


class History(RuleBasedStateMachine):
    """Starts, saves, late metrics, pins and crashes; what is there afterwards is compared with plain sorting."""

    @initialize(policy=POLICIES)
    def begin(self, policy: tuple[int, int, str, int]) -> None:
        self.n, self.k, self.mode, self.multiple = policy
        keep: Keep = Latest(self.n)
        if self.k:
            keep |= Best(self.k, "loss", self.mode)
        if self.multiple:
            keep |= EveryNSteps(self.multiple)
        self.keep = keep
        self.root, self.disk = Mortal("root"), Mortal("disk")
        self.step = 0
        self.losses: dict[int, float | None] = {}
        self.pinned: set[int] = set()
        self.alive: set[int] = set()
        self.must_stay: set[int] = set()
        self.attempts: dict[int, Attempt] = {}
        self.start()

    def start(self) -> None:
        """A new start on the same disk, and perhaps it resumes."""
        self.root.calls_left = None
        self.job = OneRank(self.root, self.disk, keep=self.keep)
        self.resumed: int | None = None

    def expected(self) -> set[int]:
        """By plain sorting."""
        steps = sorted(self.alive)
        able = [s for s in steps if self.losses[s] is not None and math.isfinite(self.losses[s] or 0.0)]
        sign = 1 if self.mode == "min" else -1
        stay = set(steps[-self.n :])
        stay |= set(sorted(able, key=lambda s: (sign * (self.losses[s] or 0.0), s))[: self.k])
        stay |= {s for s in steps if self.multiple and s % self.multiple == 0}
        return stay | (self.pinned | {self.resumed}) & self.alive

    def committed(self, gap: int, loss: float | None) -> Attempt:
        self.step += gap
        metrics = {} if loss is None else {"loss": loss}
        self.attempts[self.step] = attempt = self.job.commit(self.step, **metrics)
        self.losses[self.step] = loss
        self.alive.add(self.step)
        return attempt

    @rule(gap=st.integers(1, 5), loss=LOSSES)
    def save(self, gap: int, loss: float | None) -> None:
        attempt = self.committed(gap, loss)
        told = self.job.retain(attempt)
        assert len(told) == 1, told
        assert "removed" in told[0]
        before, self.alive = self.alive, self.expected()
        assert set(there(self.root)) == self.alive
        event(f"removed {min(len(before - self.alive), 3)} at once")

    @rule(gap=st.integers(1, 5), loss=LOSSES, calls=st.integers(0, 30), restart_calls=st.none() | st.integers(0, 20))
    def save_and_crash(self, gap: int, loss: float | None, calls: int, restart_calls: int | None) -> None:
        attempt = self.committed(gap, loss)
        self.must_stay = self.expected()
        self.root.calls_left = calls
        try:
            self.job.retain(attempt)
        except Killed:
            event("crashed while deleting")
        self.root.calls_left = restart_calls
        try:
            OneRank(self.root, self.disk, keep=self.keep)
        except Killed:
            event("crashed again while starting")
        self.root.calls_left = None
        self.alive = set(there(self.root)) & self.alive
        assert self.must_stay <= self.alive, "the crash cost a checkpoint"
        self.start()

    @rule(loss=LOSSES.filter(lambda loss: loss is not None), data=st.data())
    @precondition(lambda self: self.alive)
    def record_late(self, loss: float, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.alive)))
        sidefiles.record(self.root, self.attempts[step], {"loss": loss})
        self.losses[step] = loss

    @rule(data=st.data())
    @precondition(lambda self: self.alive)
    def pin(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.alive)))
        sidefiles.pin(self.root, self.attempts[step])
        self.pinned.add(step)

    @rule(data=st.data())
    @precondition(lambda self: self.pinned & self.alive)
    def unpin(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.pinned & self.alive)))
        sidefiles.unpin(self.root, self.attempts[step])
        self.pinned.discard(step)

    @rule(data=st.data())
    @precondition(lambda self: self.alive)
    def restart_and_resume(self, data: st.DataObject) -> None:
        self.start()
        step = data.draw(st.none() | st.sampled_from(sorted(self.alive)))
        choice = choosing.choose(self.root, step)
        assert choice.found is not None
        found = choice.found.manifest
        assert found.step == (max(self.alive) if step is None else step)
        self.job.catalog.hold(found.key)
        self.resumed = found.step

    @invariant()
    def what_is_there_is_whole_and_of_what_is_gone_nothing_is_left(self) -> None:
        if not hasattr(self, "root"):
            return
        assert set(there(self.root)) == self.alive
        for step in self.alive:
            assert discover.valid(self.root, self.attempts[step])
        gone = [str(attempt) for step, attempt in self.attempts.items() if step not in self.alive]
        rest = [key for key in self.root.objects if any(name in key for name in gone)]
        assert rest == [], "debris outlived a start"

    @invariant()
    def a_stranger_reads_the_same_as_the_job_decided(self) -> None:
        if not hasattr(self, "root") or not self.alive:
            return
        notes = SideFiles(self.root)
        plan = keeping.plan(self.root, discover.look(self.root, notes), notes, self.keep, now_s=time.time())
        resumed, self.resumed = self.resumed, None  # which only the job knows
        assert {key.step for key in plan.keep} == self.expected()
        self.resumed = resumed


TestHistory = pytest.mark.timeout(300)(History.TestCase)
TestHistory.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
