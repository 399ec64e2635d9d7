"""R11-R14: what retention deletes at a run root, in any history, with a crash before any of its calls."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from dcpsvc import commits, decision, keeping, retention, sidefiles
from dcpsvc.catalog import Catalog
from dcpsvc.decision import Decision
from dcpsvc.errors import StoreUnavailableError
from dcpsvc.format import keys
from dcpsvc.format.keys import Epoch
from dcpsvc.policies import Best, Everything, Keep, Latest
from dcpsvc.sidefiles import SideFiles
from dcpsvc.stages import discover
from dcpsvc.stages.retain import Rate
from tests.unit.histories import History
from tests.unit.one_rank import Mortal, started, there
from tests.unit.turns import Place, manifest, put_shards

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from dcpsvc.commits import Commit
    from dcpsvc.storage.base import Entry

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

TestHistory = pytest.mark.timeout(300)(History.TestCase)
TestHistory.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)

_counts = sidefiles._counts


def _the_newest_goes(rule: Keep, found: Sequence[Commit], *, protected: Mapping[Hashable, str]) -> Decision:
    """One that diverged is deleted while it is the newest, under whoever looks at it."""
    right = decision.decide(rule, found, protected=protected)
    go = {key: why for key, why in right.keep.items() if why == "newest commit"}
    return Decision({key: why for key, why in right.keep.items() if key not in go}, right.remove | go)


BUGS: dict[str, tuple[Any, str, Any]] = {
    "leases are ignored": (sidefiles, "_counts", lambda key, now_s: ".until-" not in key and _counts(key, now_s)),
    "leases never end": (sidefiles, "delete_fleeting", lambda store, key: None),
    "what diverged counts": (commits.Commit, "diverged", property(lambda self: False)),
    "the newest goes if it diverged": (retention, "decide", _the_newest_goes),
    "an edit lacks what came later": (sidefiles, "metrics_of", lambda store, found: dict(found.metrics)),
    "attempts of a step are kept one by one": (decision, "_keep_what_goes_with_them", lambda keep, found: None),
    "a pin holds one attempt": (sidefiles, "unpin_step", lambda store, step: 0),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BUGS[bug])
    quick = settings(
        max_examples=300, stateful_step_count=25, deadline=None, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    with pytest.raises(AssertionError):
        run_state_machine_as_test(History, settings=quick)


def test_of_one_step_the_tenth_start_comes_after_the_ninth() -> None:
    catalog = Catalog(manifests=[])
    for number in (10, 9, 11):
        catalog.add(manifest(Epoch(number, "deadbeef").attempt(1, 0)))
    assert catalog.manifests is not None
    assert [found.key.epoch.number for found in catalog.manifests] == [9, 10, 11]
