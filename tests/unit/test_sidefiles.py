"""R16: metrics that come late, and pins: beside a checkpoint, and never instead of one."""

from __future__ import annotations

import itertools
import json
import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dcpsvc
from dcpsvc import sidefiles
from dcpsvc.errors import CheckpointGoneError, ConfigError, FormatError, NoSuchStepError, StoreAccessError
from dcpsvc.format import keys
from dcpsvc.format import sidefiles as documents
from dcpsvc.format.keys import Attempt, Epoch
from dcpsvc.leases import held
from dcpsvc.reading import open_root
from dcpsvc.sidefiles import Lease, SideFiles
from dcpsvc.stages import discover, retain
from dcpsvc.stages.retain import Removal
from dcpsvc.tools import verifying
from tests.unit.one_process import save
from tests.unit.turns import Place, Play, put_checkpoint

OURS = Epoch(3, "cccccccc")
FIRST, SECOND = OURS.attempt(1, 0), OURS.attempt(2, 0)
NOW_S = 1_800_000_000


@pytest.fixture
def place() -> Place:
    found = Place()
    put_checkpoint(found, FIRST)
    put_checkpoint(found, SECOND)
    return found


def metrics_of(place: Place, attempt: Attempt) -> dict[str, float]:
    (found,) = [c for c in discover.listing(place) if c.key == attempt]
    return found.metrics


# --- names ----------------------------------------------------------------------------------------

steps = st.integers(0, keys.MAX_STEP)
attempts = st.builds(Attempt, steps, st.from_regex(r"[0-9a-z](?:[0-9a-z-]{0,62}[0-9a-z])?", fullmatch=True))
tokens = st.from_regex(r"[0-9a-f]{8}", fullmatch=True)


@given(attempts, st.integers(0, keys.MAX_RECORDS), tokens, st.none() | st.integers(0, keys.MAX_UNTIL_S))
def test_every_key_beside_an_attempt_leads_back_to_it(attempt: Attempt, number: int, token: str, until: int) -> None:
    assert keys.record_of(attempt.record(number, token)) == (attempt, number)
    assert keys.pin_of(attempt.pin(token, until)) == (attempt, until)
    for key in (attempt.record(number, token), attempt.pin(token, until)):
        assert keys.attempt_beside(key) == attempt
        assert keys.attempt_of(key) is None, "it is no part of the checkpoint"


@given(st.integers(1, keys.MAX_EPOCH), tokens)
def test_the_key_of_a_policy_leads_back_to_its_epoch(number: int, token: str) -> None:
    assert keys.policy_of(Epoch(number, token).policy) == Epoch(number, token)


@pytest.mark.parametrize(
    "key",
    [
        "metrics/step-000000000001.cafe-0/00000001.cafecafe.json.tmp",
        "metrics/step-000000000001.cafe-0/1.cafecafe.json",
        "metrics/step-000000000001.cafe-0/../00000001.cafecafe.json",
        "metrics/step-000000000001.cafe-0/00000001.CAFECAFE.json",
        "pins/step-000000000001.cafe-0/cafecafe",
        "pins/step-000000000001.cafe-0/cafecafe.until-1.json",
        "pins/step-1.cafe-0/cafecafe.json",
        "pins/cafecafe.json",
        "policies/1.cafecafe.json",
        "policies/00000001.cafecafe.json\n",
    ],
)
def test_other_names_are_not_ours(key: str) -> None:
    assert keys.record_of(key) is keys.pin_of(key) is keys.policy_of(key) is None


# --- metrics --------------------------------------------------------------------------------------


def test_numbers_recorded_later_are_listed_with_the_checkpoint_and_the_latest_counts(place: Place) -> None:
    sidefiles.record(place, FIRST, {"eval": 0.5, "acc": 1})
    sidefiles.record(place, FIRST, {"eval": math.nan})
    sidefiles.record(place, SECOND, {"eval": -math.inf})
    assert metrics_of(place, FIRST) == pytest.approx({"eval": math.nan, "acc": 1.0}, nan_ok=True)
    assert metrics_of(place, SECOND) == {"eval": -math.inf}
    sidefiles.record(place, FIRST, {"eval": 0.0})
    assert metrics_of(place, FIRST) == {"eval": 0.0, "acc": 1.0}
    assert sidefiles.metrics_of(place, discover.read_manifest(place, FIRST)) == {"eval": 0.0, "acc": 1.0}


def test_two_records_made_at_once_are_ordered_alike_for_every_reader(place: Place) -> None:
    with Play() as play:
        put_checkpoint(play.root, FIRST)
        one, other = (
            play.job(token, lambda _, tiers, v=value: sidefiles.record(tiers.remote, FIRST, {"eval": v}))
            for token, value in (("aaaaaaaa", 1.0), ("bbbbbbbb", 2.0))
        )
        for job in (one, other):
            job.until("create", keys.METRICS)  # both have looked for the last number
        for job in (one, other):
            job.end()
        numbers = [keys.record_of(key)[1] for key in play.root.below(keys.METRICS)]
        assert numbers == [1, 1]
        assert metrics_of(play.root, FIRST) == metrics_of(play.root, FIRST)


def test_nothing_is_recorded_for_a_checkpoint_that_is_not_there(place: Place) -> None:
    before = dict(place.objects)
    with pytest.raises(CheckpointGoneError, match="step 9: it is not committed"):
        sidefiles.record(place, OURS.attempt(9, 0), {"eval": 1.0})
    with pytest.raises(CheckpointGoneError, match="step 9: it is not committed"):
        sidefiles.pin(place, OURS.attempt(9, 0))
    assert place.objects == before


@pytest.mark.parametrize("metrics", [{}, {"x": "3"}, {"x": None}, {"x": [1]}, {"": 1.0}, {"a\n": 1.0}, {3: 1.0}])
def test_what_is_no_number_is_refused_by_name(place: Place, metrics: dict[str, float]) -> None:
    before = dict(place.objects)
    with pytest.raises(ConfigError, match="metrics"):
        sidefiles.record(place, FIRST, metrics)
    assert place.objects == before


def test_a_damaged_record_is_passed_over_and_the_listing_stands(place: Place) -> None:
    sidefiles.record(place, FIRST, {"eval": 1.0})
    sidefiles.record(place, FIRST, {"eval": 2.0})
    last = place.below(keys.METRICS)[-1]
    place.put(last, place.objects[last].replace(b"2.0", b"3.0"))
    place.put(FIRST.record(7, "cafecafe"), b"{")
    assert metrics_of(place, FIRST) == {"eval": 1.0}


def test_a_record_of_another_attempt_is_refused() -> None:
    data = documents.Record(attempt=FIRST, recorded="now", metrics={}).dumps()
    with pytest.raises(FormatError, match=r"its content says step-000000000001\.3-cccccccc-0"):
        documents.load_record(SECOND.record(1, "cafecafe"), data)


def test_a_record_reads_as_the_documentation_shows_it(place: Place) -> None:
    sidefiles.record(place, FIRST, {"eval": math.inf})
    content = json.loads(place.objects[place.below(keys.METRICS)[0]])
    assert sorted(content) == ["attempt", "digest", "format", "metrics", "recorded", "step"]
    assert content["metrics"] == {"eval": "inf"}


# --- pins -----------------------------------------------------------------------------------------


def pins(place: Place, now_s: float = NOW_S) -> dict[Attempt, tuple[str, ...]]:
    notes = SideFiles(place)
    notes.look()
    return notes.pins(now_s)


def test_a_pin_holds_until_it_is_taken_away_and_says_why(place: Place) -> None:
    sidefiles.pin(place, FIRST, "figure 3")
    sidefiles.pin(place, FIRST)
    assert sorted(pins(place)[FIRST]) == ["pinned", "pinned: figure 3"]
    assert sidefiles.unpin(place, FIRST) == 2
    assert pins(place) == {}
    assert sidefiles.unpin(place, FIRST) == 0


def test_pins_of_all_attempts_of_a_step_are_taken_away_together_and_of_no_other_step(place: Place) -> None:
    again, other = Attempt(FIRST.step, "2-0123abcd-0"), Attempt(FIRST.step + 1, "2-0123abcd-0")
    for attempt in (again, other):
        put_checkpoint(place, attempt)
    for attempt in (FIRST, again, other):
        sidefiles.pin(place, attempt)
    assert sidefiles.unpin_step(place, FIRST.step) == 2
    assert pins(place).keys() == {other}


def test_a_damaged_pin_pins(place: Place) -> None:
    place.put(FIRST.pin("cafecafe"), b"{")
    assert pins(place) == {FIRST: ("pinned",)}
    assert sidefiles.is_pinned(place, FIRST, NOW_S)


def test_a_lease_ends_by_itself_a_little_later_than_it_says_and_unpin_leaves_it(place: Place) -> None:
    Lease(place, 60).take(FIRST)
    began_s = time.time()
    assert sidefiles.unpin(place, FIRST) == 0
    assert "being read until" in pins(place, began_s)[FIRST][0]
    assert sidefiles.is_pinned(place, FIRST, began_s + 50 + sidefiles.CLOCK_SLACK_S)
    assert not sidefiles.is_pinned(place, FIRST, began_s + 70 + sidefiles.CLOCK_SLACK_S)
    assert pins(place, began_s + 70 + sidefiles.CLOCK_SLACK_S) == {}


def test_a_lease_that_is_given_back_leaves_nothing(place: Place) -> None:
    before = dict(place.objects)
    lease = Lease(place, 60)
    lease.take(FIRST)
    lease.take(SECOND)
    assert place.objects != before
    lease.release()
    assert place.objects == before


class ReadOnly(Place):
    """Nobody may write."""

    def create(self, key: str, data: bytes) -> bool:
        raise StoreAccessError("create", key, "403")

    def delete(self, key: str) -> None:
        raise StoreAccessError("delete", key, "403")


def test_a_root_that_cannot_be_written_is_read_without_a_lease() -> None:
    place = ReadOnly()
    lease = Lease(place, 60)
    lease.take(FIRST)
    lease.release()
    assert place.objects == {}


# --- against a deletion ---------------------------------------------------------------------------


def orders(first: int, second: int) -> list[tuple[int, ...]]:
    """All ways to take turns."""
    places = itertools.combinations(range(first + second), first)
    return [tuple(0 if turn in chosen else 1 for turn in range(first + second)) for chosen in places]


def deletion(_: object, tiers) -> Removal:
    held = lambda: sidefiles.is_pinned(tiers.remote, FIRST, NOW_S)  # noqa: E731
    return retain.remove(tiers.remote, FIRST, lambda: True, held=held)


def calls_of(work) -> int:
    with Play() as play:
        put_checkpoint(play.root, FIRST)
        job = play.job("aaaaaaaa", work)
        job.end()
        return job.calls


NOTES = {
    "pin": lambda _, tiers: sidefiles.pin(tiers.remote, FIRST),
    "record": lambda _, tiers: sidefiles.record(tiers.remote, FIRST, {"eval": 1.0}),
}


@pytest.mark.parametrize("what", NOTES)
def test_in_whatever_order_a_note_and_a_deletion_go_the_two_agree_on_what_is_left(what: str) -> None:
    """A pin that was accepted has kept its checkpoint; of one that was deleted nothing lies about."""
    outcomes = set()
    for order in orders(calls_of(deletion), calls_of(NOTES[what])):
        with Play() as play:
            put_checkpoint(play.root, FIRST)
            put_checkpoint(play.root, SECOND)
            jobs = play.job("aaaaaaaa", deletion), play.job("bbbbbbbb", NOTES[what])
            for turn in order:
                jobs[turn].step()
            for job in jobs:
                while job.step():
                    pass
            noted, stands = jobs[1].error is None, FIRST in discover.committed(play.root)
            assert isinstance(jobs[1].error, CheckpointGoneError | None), jobs[1].error
            assert stands == (jobs[0].value is Removal.HELD)
            if what == "pin":
                assert stands or not noted, f"{order}: pinned, and deleted"
            left = [key for key in play.root.objects if str(FIRST) in key]
            if stands:
                assert discover.valid(play.root, FIRST)
                assert FIRST.tombstone not in left
            else:
                assert left == [], f"{order}: {left}"
            outcomes.add((noted, stands))
    assert outcomes >= ({(True, True), (False, False)} if what == "pin" else {(True, False), (False, False)})


def test_what_lies_beside_a_checkpoint_goes_with_it(place: Place) -> None:
    sidefiles.record(place, FIRST, {"eval": 1.0})
    Lease(place, 60).take(FIRST)
    assert retain.remove(place, FIRST, lambda: True) is Removal.DONE
    assert [key for key in place.objects if str(FIRST) in key] == []


def test_a_note_that_outlived_its_checkpoint_makes_none_and_goes_with_the_debris(place: Place) -> None:
    gone = Epoch(2, "bbbbbbbb").attempt(5, 0)
    place.put(gone.record(1, "cafecafe"), b"{}")
    assert gone not in {c.key for c in discover.listing(place)}
    assert retain.debris(place, OURS, [FIRST, SECOND]) == [gone]
    retain.finish_removal(place, gone)
    assert [key for key in place.objects if str(gone) in key] == []


# --- from outside a job ---------------------------------------------------------------------------


def test_metrics_and_pins_from_outside_are_seen_by_a_listing_and_resume_passes_over_what_is_tagged(tmp_path) -> None:
    root = tmp_path / "root"
    save(tmp_path, {"n": [1]}, 10)
    save(tmp_path, {"n": [2]}, 20)
    dcpsvc.record_metrics(root, 20, {"eval": 0.25})
    dcpsvc.pin(root, 10, "figure 3")
    assert [c.metrics.get("eval") for c in dcpsvc.list_checkpoints(root)] == [None, 0.25]
    assert dcpsvc.unpin(root, 10) == 1
    with pytest.raises(NoSuchStepError, match="step 15"):
        dcpsvc.pin(root, 15)
    with pytest.raises(NoSuchStepError, match="no committed attempt x"):
        dcpsvc.record_metrics(root, 10, {"eval": 1.0}, attempt="x")

    dcpsvc.record_metrics(root, 20, {"diverged": 1})
    state = {"n": [0]}
    assert dcpsvc.load(root, state) == 10
    assert dcpsvc.latest(root).step == 10
    assert dcpsvc.load(root, state, 20) == dcpsvc.load(root, state, even_diverged=True) == 20
    dcpsvc.record_metrics(root, 20, {"diverged": 0})
    assert dcpsvc.load(root, state) == 20
    assert not list((root / "pins").rglob("*.json")), "leases are given back"


def test_a_reading_that_outlives_its_first_lease_is_not_deleted_by_another_jobs_retention(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(sidefiles, "CLOCK_SLACK_S", 0)
    root = tmp_path / "root"
    with dcpsvc.Checkpointer(root, {"x": 1}, local=tmp_path / "local", keep=dcpsvc.Latest(1)) as ckpt:
        ckpt.save(1).wait(30)
        store = open_root(root)
        (first,) = discover.committed(store)
        with held(store, first, seconds=1.0):
            until = max(pin[1] for entry in store.list(first.pins) if (pin := keys.pin_of(entry.key)) and pin[1])
            ends = time.monotonic() + 30
            while time.time() <= until + 1:
                assert time.monotonic() < ends
                time.sleep(0.05)
            ckpt.save(2).wait(30)
            ckpt.wait(30)
            assert [attempt.step for attempt in discover.committed(store)] == [1, 2]
        assert not store.list(first.pins)
        ckpt.save(3).wait(30)
        ckpt.wait(30)
        assert [attempt.step for attempt in discover.committed(store)] == [3]


def test_verifying_holds_what_it_reads_and_leaves_nothing_behind(tmp_path) -> None:
    root = tmp_path / "root"
    with dcpsvc.Checkpointer(root, {"x": torch.arange(1000.0)}, local=tmp_path / "local") as ckpt:
        ckpt.save(1).wait(30)
    store, seen = open_root(root), []
    (first,) = discover.committed(store)
    findings = verifying.verify(store, [first], lambda _: seen.append(sidefiles.is_pinned(store, first, time.time())))
    assert all(finding.intact for finding in findings)
    assert seen
    assert all(seen)
    assert not store.list(first.pins)
