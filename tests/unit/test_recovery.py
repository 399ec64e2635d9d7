"""An upload that was cut short is finished under its attempt by whoever starts next, or not at all."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc import recovery
from dcpsvc.errors import StoreError, StoreUnavailableError
from dcpsvc.format import keys
from dcpsvc.format.keys import Attempt, Epoch
from dcpsvc.ranks.c10d import SoloStore
from dcpsvc.ranks.job import Job
from dcpsvc.ranks.rendezvous import DisagreementError, Rendezvous
from dcpsvc.settling import Settled, settle
from dcpsvc.stages import discover
from dcpsvc.tiers import Tiers
from tests.unit import turns
from tests.unit.turns import LAYOUT, MEETING, RUN_ID, Direct, Free, Place, Seat, put_checkpoint, put_journal, put_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dcpsvc.storage.base import Store

OLD, NEW = "aaaaaaaa", "bbbbbbbb"
DONE, CRASHED, NEWER = (Epoch(1, OLD).attempt(step, 0) for step in (10, 20, 30))


@pytest.fixture
def root() -> Place:
    """A run root with one commit, whose job has died since."""
    place = Place()
    place.put(Epoch(1, OLD).claim, b"")
    put_checkpoint(place, DONE, 3)
    return place


@pytest.fixture
def disk() -> Place:
    return Place("disk")


class Failing:
    """A store in which one call fails, the ``at``-th, before it is done or after.

    Attributes:
        struck: Whether it came to that.
    """

    def __init__(self, store: Store, at: int, *, done: bool) -> None:
        self._store, self._left, self._done = store, at, done
        self.struck = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        return functools.partial(self._call, name, found) if callable(found) else found

    def _call(self, name: str, work: Callable[..., Any], key: str, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        strikes = self._left < 0 and not self.struck
        self.struck = self.struck or strikes
        answer = work(key, *args, **kwargs) if self._done or not strikes else None
        if strikes:
            raise StoreUnavailableError(name, key, "simulated")
        return answer


def start(
    root: Place, *disks: Place, nodes: Sequence[int] | None = None, remote: Store | None = None
) -> list[Settled | DisagreementError]:
    """Start a job; a rank for each disk, or ``nodes`` says which disk each rank has."""
    placed = [disks[node] for node in nodes] if nodes is not None else list(disks)
    by_name = {disk.url.removeprefix("memory://"): disk for disk in disks}
    shared = SoloStore()

    def run(rank: int) -> Settled | DisagreementError:
        rendezvous = Rendezvous(rank, len(placed), shared, Direct(), NEW)
        job = Job(rank, len(placed), NEW, rendezvous, group=None)
        local = Seat(placed[rank], Free(), by_name)
        path = Path(placed[rank].url.removeprefix("memory:/"))
        mine = remote or Seat(root, Free(), by_name)
        try:
            return settle(job, Tiers(run_id=RUN_ID, remote=mine, local=local, local_path=path), MEETING)
        except DisagreementError as err:
            return err

    with ThreadPoolExecutor(len(placed)) as pool:
        return list(pool.map(run, range(len(placed))))


def recovered(settled: Iterable[Settled | DisagreementError]) -> tuple[Attempt, ...]:
    """What a start has finished, as every rank says it."""
    (found,) = {one.recovered for one in settled if isinstance(one, Settled)}
    return found


def whole(root: Place) -> list[Attempt]:
    """What counts; each of it must have all its files, with their bytes."""
    counting = discover.committed(root)
    for attempt in counting:
        for record in discover.valid(root, attempt).shards:
            assert root.objects[record.path] == turns.shard(attempt, record.rank)[1]
    return counting


# --- what lies on a disk ----------------------------------------------------------------------------


def held(disk: Place) -> dict[Attempt, tuple[list[int], int]]:
    found = recovery.holdings(Tiers(run_id=RUN_ID, remote=Place(), local=disk, local_path=Path("/disk")))
    return {Attempt(*one["attempt"]): (one["shards"], one["world_size"]) for one in found}


def test_a_disk_tells_its_shards_and_which_attempts_were_complete(disk: Place) -> None:
    put_journal(disk, CRASHED, 3, ranks=[1, 2])
    put_shards(disk, NEWER, [0])
    assert held(disk) == {CRASHED: ([1, 2], 3), NEWER: ([0], 0)}


def test_a_journal_without_shards_is_told_too_for_they_may_lie_elsewhere(disk: Place) -> None:
    put_journal(disk, CRASHED, 2, ranks=[])
    assert held(disk) == {CRASHED: ([], 2)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        turns.manifest(CRASHED, 2).dumps()[:-40],
        turns.manifest(CRASHED, 2).dumps().replace(b'"step": 20', b'"step": 21'),
        turns.manifest(NEWER, 2).dumps(),
        turns.manifest(CRASHED, 2, run_id="another run").dumps(),
    ],
    ids=["empty", "nothing", "torn", "flipped", "another attempt's", "another run's"],
)
def test_a_journal_entry_that_is_not_whole_or_not_ours_is_none(disk: Place, data: bytes) -> None:
    put_shards(disk, CRASHED, [0, 1])
    disk.put(CRASHED.manifest, data)
    assert held(disk) == {CRASHED: ([0, 1], 0)}


def test_files_that_are_not_ours_are_not_told(disk: Place) -> None:
    for key in ("data/x", "data/step-1/rank-0.pt", f"{CRASHED.data}notes.txt", "manifests/readme", "lost+found/x"):
        disk.put(key, b"x")
    assert held(disk) == {}


# --- who carries what -------------------------------------------------------------------------------

shards = st.lists(st.integers(0, 5), unique=True, max_size=6)
one_holding = st.fixed_dictionaries({"shards": shards, "world_size": st.sampled_from([0, 4])})


@st.composite
def holdings(draw: st.DrawFn) -> list[list[dict[str, Any]]]:
    attempts = [CRASHED, NEWER]
    ranks = draw(st.lists(st.lists(st.sampled_from(attempts), unique=True), min_size=1, max_size=5))
    return [[draw(one_holding) | {"attempt": list(attempt)} for attempt in mine] for mine in ranks]


@given(holdings(), st.permutations([CRASHED, NEWER, Attempt(99, "nobody-has-it")]))
def test_a_plan_names_for_each_shard_one_rank_that_sees_it_if_any_does(
    held: list[list[dict[str, Any]]], candidates: list[Attempt]
) -> None:
    before = copy.deepcopy(held)
    made = recovery.plans(held, candidates, len(held))
    assert held == before
    assert made == recovery.plans(before, tuple(candidates), len(held))
    planned = [Attempt(*plan["attempt"]) for plan in made]
    assert planned == [one for one in candidates if one in planned]
    for attempt in candidates:
        mine = {rank: one for rank, all_of in enumerate(held) for one in all_of if one["attempt"] == list(attempt)}
        assert (attempt in planned) == any(one["world_size"] for one in mine.values())
    for plan in made:
        check_plan(plan, held)


def check_plan(plan: dict[str, Any], held: list[list[dict[str, Any]]]) -> None:
    sees = [{shard for one in mine if one["attempt"] == plan["attempt"] for shard in one["shards"]} for mine in held]
    assert any(one["attempt"] == plan["attempt"] and one["world_size"] for one in held[plan["journal"]])
    assert len(plan["carriers"]) == 4
    for shard, carrier in enumerate(plan["carriers"]):
        assert 0 <= carrier < len(held)
        if any(shard in mine for mine in sees):
            assert shard in sees[carrier]
        if shard < len(held) and shard in sees[shard]:
            assert carrier == shard


def test_the_ranks_of_a_node_share_its_shards_out() -> None:
    node = {"attempt": list(CRASHED), "shards": list(range(8, 16)), "world_size": 16}
    (plan,) = recovery.plans([[], [], [node], [node], [node], [node]], [CRASHED], 6)
    assert sorted(plan["carriers"][8:]) == [2, 2, 3, 3, 4, 4, 5, 5]


def test_a_plan_for_4096_ranks_is_made_in_no_time_to_speak_of() -> None:
    nodes = [{"attempt": list(CRASHED), "shards": list(range(n, n + 8)), "world_size": 4096} for n in range(0, 4096, 8)]
    (plan,) = recovery.plans([[nodes[rank // 8]] for rank in range(4096)], [CRASHED], 4096)
    assert plan["carriers"] == list(range(4096))


# --- finishing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("uploaded", [(), (0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_a_job_of_any_size_finishes_what_lies_on_its_disks_or_at_the_root(
    root: Place, world_size: int, uploaded: tuple[int, ...]
) -> None:
    near, far = Place("near"), Place("far")
    put_journal(near, CRASHED, 3, ranks=[0, 1])
    put_journal(far, CRASHED, 3, ranks=[2])
    put_shards(root, CRASHED, uploaded)
    nodes = [0, *[1] * (world_size - 1)] if world_size > 1 else [0]
    if world_size == 1:
        put_shards(near, CRASHED, [2])
    assert recovered(start(root, near, far, nodes=nodes)) == (CRASHED,)
    assert whole(root) == [DONE, CRASHED]
    assert near.below("data/")


def test_a_shard_that_lies_on_no_disk_any_more_is_found_at_the_root(root: Place, disk: Place) -> None:
    put_journal(disk, CRASHED, 3, ranks=[0])
    put_shards(root, CRASHED, [1, 2])
    assert recovered(start(root, disk, Place("empty"), nodes=[0, 1])) == (CRASHED,)
    assert whole(root) == [DONE, CRASHED]


def test_a_shard_that_lies_nowhere_ends_it_and_the_debris_of_this_disk_goes(root: Place, disk: Place) -> None:
    put_journal(disk, CRASHED, 3, ranks=[0, 2])
    put_shards(root, CRASHED, [0])
    assert recovered(start(root, disk)) == ()
    assert whole(root) == [DONE]
    assert disk.below("data/") == disk.below(keys.MANIFESTS) == []


def test_what_is_at_the_root_and_not_whole_is_sent_again(root: Place, disk: Place) -> None:
    put_journal(disk, CRASHED, 3)
    record, content = turns.shard(CRASHED, 1)
    root.put(record.path, content[:-1])
    root.put(turns.shard(CRASHED, 2)[0].path, b"x" * len(content))
    assert recovered(start(root, disk)) == (CRASHED,)
    assert whole(root) == [DONE, CRASHED]


@pytest.mark.parametrize("damage", ["flipped", "cut", "swapped"])
def test_a_shard_that_rotted_on_its_disk_is_never_committed(root: Place, disk: Place, damage: str) -> None:
    put_journal(disk, CRASHED, 2)
    record, content = turns.shard(CRASHED, 1)
    other = turns.shard(CRASHED, 0)[1]
    disk.put(record.path, {"flipped": b"\0" + content[1:], "cut": content[:-1], "swapped": other}[damage])
    assert recovered(start(root, disk)) == ()
    assert whole(root) == [DONE]


def test_a_shard_that_rotted_on_its_disk_does_not_matter_if_the_root_has_it(root: Place, disk: Place) -> None:
    put_journal(disk, CRASHED, 2)
    put_shards(root, CRASHED, [1])
    disk.put(CRASHED.shard(1), b"rot")
    assert recovered(start(root, disk)) == (CRASHED,)
    assert whole(root) == [DONE, CRASHED]


@pytest.mark.parametrize("layout", [LAYOUT + b" ", b"", None], ids=["longer", "empty", "missing"])
def test_a_layout_that_rotted_or_went_is_never_committed_on(root: Place, disk: Place, layout: bytes | None) -> None:
    put_journal(disk, CRASHED)
    path = turns.manifest(CRASHED).layout.path
    disk.delete(path)
    root.delete(path)
    if layout is not None:
        disk.put(path, layout)
    assert recovered(start(root, disk)) == ()
    assert CRASHED.manifest not in root.objects


def test_a_journal_that_names_a_shard_of_another_attempt_changes_nothing_at_the_root(root: Place, disk: Place) -> None:
    put_journal(disk, CRASHED)
    journal = turns.manifest(CRASHED)
    stolen = replace(journal.shards[0], path=DONE.shard(0))
    disk.put(CRASHED.manifest, replace(journal, shards=(stolen,)).dumps())
    disk.put(DONE.shard(0), turns.shard(CRASHED)[1])
    assert recovered(start(root, disk)) == ()
    assert whole(root) == [DONE]


def test_of_two_uploads_the_newer_is_finished_and_the_older_is_superseded(root: Place, disk: Place) -> None:
    for attempt in (CRASHED, NEWER):
        put_journal(disk, attempt)
    assert recovered(start(root, disk)) == (NEWER,)
    assert whole(root) == [DONE, NEWER]
    assert disk.below("data/") == [NEWER.shard(0)]


def test_if_the_newer_upload_cannot_be_finished_the_older_one_is(root: Place, disk: Place, caplog: Any) -> None:
    for attempt in (CRASHED, NEWER):
        put_journal(disk, attempt)
    disk.put(NEWER.shard(0), b"rot")
    with caplog.at_level(logging.WARNING):
        assert recovered(start(root, disk)) == (CRASHED,)
    assert whole(root) == [DONE, CRASHED]
    assert "step 30" in caplog.text
    assert NEWER.shard(0) in caplog.text


def test_of_two_tries_of_one_step_the_later_job_s_is_finished(root: Place, disk: Place) -> None:
    tries = [Epoch(9, OLD).attempt(20, 0), Epoch(10, OLD).attempt(20, 0)]
    root.put(Epoch(10, OLD).claim, b"")
    for attempt in tries:
        put_journal(disk, attempt)
    assert recovered(start(root, disk)) == (tries[1],)


@pytest.mark.parametrize("step", [5, 10])
def test_an_upload_that_a_commit_has_passed_is_discarded(root: Place, disk: Place, step: int) -> None:
    put_journal(disk, Epoch(1, OLD).attempt(step, 7))
    assert recovered(start(root, disk)) == ()
    assert whole(root) == [DONE]
    assert disk.below("data/") == disk.below(keys.MANIFESTS) == []


def test_an_upload_whose_deletion_has_begun_is_not_finished(root: Place, disk: Place) -> None:
    put_journal(disk, CRASHED)
    root.put(CRASHED.tombstone, b"{}")
    assert recovered(start(root, disk)) == ()
    assert whole(root) == [DONE]


def test_the_commit_that_is_on_the_disk_as_well_is_left_alone(root: Place, disk: Place) -> None:
    put_journal(disk, DONE, 3)
    before = dict(root.objects)
    assert recovered(start(root, disk)) == ()
    assert {key: root.objects[key] for key in before} == before
    assert len(disk.below(DONE.data)) == 3


def test_a_finished_upload_is_not_finished_again(root: Place, disk: Place) -> None:
    put_journal(disk, CRASHED)
    assert recovered(start(root, disk)) == (CRASHED,)
    (again,) = start(root, disk)
    assert isinstance(again, Settled)
    assert again.recovered == ()
    assert again.committed == (DONE, CRASHED)


def test_a_manifest_that_stands_but_does_not_count_is_finished_by_whoever_has_the_journal(
    root: Place, disk: Place
) -> None:
    """A start that died between the manifest and its inheritance; others had started since the attempt was made."""
    start(root, Place("empty"))
    put_checkpoint(root, CRASHED)
    assert whole(root) == [DONE]
    put_journal(disk, CRASHED)
    assert recovered(start(root, disk)) == (CRASHED,)
    assert whole(root) == [DONE, CRASHED]


# --- a store that says no, at every call ------------------------------------------------------------


@pytest.mark.parametrize("done", [False, True], ids=["before it is done", "after"])
@pytest.mark.parametrize("tier", ["remote", "local"])
def test_a_start_in_which_one_call_fails_ends_or_goes_on_and_the_next_one_finishes_the_upload(
    tier: str,
    done: bool,  # noqa: FBT001
) -> None:
    for at in itertools.count():
        root, disk = Place(), Place("disk")
        root.put(Epoch(1, OLD).claim, b"")
        put_checkpoint(root, DONE, 3)
        put_journal(disk, CRASHED, 2)
        remote: Any = Seat(root, Free(), {"disk": disk})
        failing = Failing(remote if tier == "remote" else disk, at, done=done)
        first = begin(failing if tier == "remote" else remote, failing if tier == "local" else disk)
        if isinstance(first, Settled):
            assert whole(root) == list(first.committed), at
            assert not {*first.unfinished} & {*first.committed}, at  # what is unfinished is going to be deleted
        (settled,) = start(root, disk)
        assert isinstance(settled, Settled)
        assert whole(root) == list(settled.committed), at
        assert settled.committed == (DONE, CRASHED), at
        if not failing.struck:
            break
    assert at > (20 if tier == "remote" else 4)


def begin(remote: Any, local: Any) -> Settled | DisagreementError:
    try:
        return settle(
            turns.solo(NEW), Tiers(run_id=RUN_ID, remote=remote, local=local, local_path=Path("/disk")), MEETING
        )
    except DisagreementError as err:
        return err


def test_a_failure_on_one_rank_is_told_to_all_and_the_start_goes_on(root: Place) -> None:
    near, far = Place("near"), Place("far")
    put_journal(near, CRASHED, 2, ranks=[0])
    put_journal(far, CRASHED, 2, ranks=[1])
    far.put(CRASHED.shard(1), b"rot")
    settled = start(root, near, far)
    assert [one.committed for one in settled if isinstance(one, Settled)] == [(DONE,)] * 2


class Blind(Place):
    """A disk that cannot be listed."""

    def list(self, prefix: str) -> list[Any]:
        raise StoreError("list", prefix, "EIO")


def test_a_disk_that_cannot_be_listed_ends_the_start_on_every_rank_alike(root: Place, disk: Place) -> None:
    broken = Tiers(run_id=RUN_ID, remote=root, local=Blind("blind"), local_path=Path("/blind"))
    good = Tiers(run_id=RUN_ID, remote=root, local=disk, local_path=Path("/disk"))
    shared = SoloStore()

    def run(rank: int) -> tuple[Any, ...]:
        job = Job(rank, 2, NEW, Rendezvous(rank, 2, shared, Direct(), NEW), group=None)
        with pytest.raises(DisagreementError) as caught:
            settle(job, [good, broken][rank], MEETING)
        return caught.value.failures

    with ThreadPoolExecutor(2) as pool:
        heard = list(pool.map(run, range(2)))
    assert heard[0] == heard[1]
    assert [(failure.rank, failure.error) for failure in heard[0]] == [(1, StoreError.__name__)]
