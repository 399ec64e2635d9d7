"""Whatever several jobs on one run root do at once, what was said to be committed stays so, and stays whole."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpsvc.catalog import Catalog
from dcpsvc.config import Options
from dcpsvc.errors import FencedError, RunBusyError, StoreFullError
from dcpsvc.events import Events
from dcpsvc.format import keys, parts, shardfile
from dcpsvc.format.keys import Attempt, Epoch
from dcpsvc.life import Life
from dcpsvc.pending import PendingSave
from dcpsvc.policies import Everything, Keep, Latest
from dcpsvc.ranks.c10d import Group
from dcpsvc.ranks.rendezvous import DisagreementError
from dcpsvc.retention import Retention
from dcpsvc.save import Save
from dcpsvc.settling import OpenRun, Settled, settle
from dcpsvc.stages import ack, discover, retain
from tests.unit import turns
from tests.unit.turns import MEETING, Place, Play, Turn, put_checkpoint, put_journal, put_shards

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from dcpsvc.errors import SaveError
    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.ranks.job import Job
    from dcpsvc.storage.base import Store
    from dcpsvc.tiers import Tiers

A, B, C, D = "aaaaaaaa", "bbbbbbbb", "cccccccc", "dddddddd"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of saves are refused here, and each says so."""
    logger = logging.getLogger("dcpsvc")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def start(job: Job, tiers: Tiers) -> Settled:
    return settle(job, tiers, MEETING)


def refused(turn: Turn) -> list[str]:
    """Why a job could not start: the types of the failures."""
    with pytest.raises(DisagreementError) as caught:
        turn.end()
    return [failure.error for failure in caught.value.failures]


def whole(place: Place) -> list[Attempt]:
    """What counts; each of it must have all its files."""
    counting = discover.committed(place)
    for attempt in counting:
        discover.valid(place, attempt)
    return counting


def deleting(job: Job, tiers: Tiers, epoch: Epoch, attempt: Attempt) -> None:
    """What a job of that epoch does when an attempt of its own has failed."""
    run = opened(tiers, Settled(epoch=epoch, committed=(), recovered=(), unfinished=()))
    Retention(job, run, Options(), Events(rank=0, observer=None), Catalog()).discard(attempt)


def opened(tiers: Tiers, settled: Settled) -> OpenRun:
    return OpenRun(
        run_id=tiers.run_id, remote=tiers.remote, local=tiers.local, local_path=tiers.local_path, settled=settled
    )


# --- a start ----------------------------------------------------------------------------------------


def test_a_first_start_finds_nothing_and_owns_the_root() -> None:
    with Play() as play:
        assert play.job(A, start).end() == Settled(epoch=Epoch(1, A), committed=(), recovered=(), unfinished=())
        assert play.root.below("") == [Epoch(1, A).inheritance, Epoch(1, A).claim]


def test_a_start_inherits_what_counts_and_what_nobody_of_ours_has_written() -> None:
    with Play() as play:
        foreign = Attempt(5, "old-0")
        put_checkpoint(play.root, foreign)
        first = play.job(A, start).end()
        put_checkpoint(play.root, first.epoch.attempt(10, 0))
        second = play.job(B, start).end()
        assert second.committed == (foreign, Attempt(10, f"1-{A}-0"))
        assert whole(play.root) == list(second.committed)


@pytest.mark.parametrize(("token", "loser"), [(A, "first"), (C, "second")])
def test_of_two_jobs_that_start_together_one_is_told_at_once_that_the_other_owns_the_root(
    token: str, loser: str
) -> None:
    """The first has counted the epochs before the second claims, and claims the same one after it."""
    with Play() as play:
        first = play.job(token, start).until("create", keys.EPOCHS)
        second = play.job(B, start).until("create", keys.EPOCHS, ending="inherited.json")
        if loser == "first":
            assert refused(first) == [RunBusyError.__name__]
            assert second.end().epoch == Epoch(1, B)
        else:
            assert first.end().epoch == Epoch(1, C)
            assert refused(second) == [RunBusyError.__name__]


def test_of_two_jobs_of_which_one_counts_the_other_in_the_later_one_owns_the_root() -> None:
    with Play() as play:
        second = play.job(A, start).until("list", keys.EPOCHS)
        first = play.job(B, start).until("create", keys.EPOCHS, ending="inherited.json")
        assert second.end().epoch == Epoch(2, A)
        assert refused(first) == [RunBusyError.__name__]


def test_a_job_that_is_replaced_while_it_starts_is_refused_and_names_its_successor() -> None:
    with Play() as play:
        first = play.job(A, start).until("create", keys.EPOCHS, ending="inherited.json")
        play.job(B, start).end()
        with pytest.raises(DisagreementError) as caught:
            first.end()
        (failure,) = caught.value.failures
        assert B in failure.text
        assert "epoch 2" in failure.text


def test_a_job_that_is_replaced_while_it_recovers_is_refused_and_deletes_nothing_of_what_the_other_finishes() -> None:
    with Play() as play:
        crashed = Attempt(20, f"1-{D}-0")
        play.root.put(Epoch(1, D).claim, b"")
        for disk in ("disk-b", "disk-c"):
            put_journal(play.disk(disk), crashed)
        first, second = (play.job(token, start, disk=disk) for token, disk in ((B, "disk-b"), (C, "disk-c")))
        first.until("put_file")
        second.until("create", crashed.manifest)
        assert refused(first) == [RunBusyError.__name__]
        assert crashed.manifest not in play.root.objects
        assert second.end().recovered == (crashed,)
        assert whole(play.root) == [crashed]


def test_a_start_deletes_nothing_at_the_root_that_a_later_one_might_finish() -> None:
    with Play() as play:
        crashed = Attempt(20, f"1-{D}-0")
        play.root.put(Epoch(1, D).claim, b"")
        put_shards(play.root, crashed)
        put_journal(play.disk("disk-c"), crashed, ranks=[])
        play.disk("disk-b").put(crashed.shard(0), b"torn")
        play.job(B, start, disk="disk-b").end()
        assert play.disk("disk-b").below("data/") == []
        assert play.job(C, start, disk="disk-c").end().recovered == (crashed,)
        assert whole(play.root) == [crashed]


def test_a_job_whose_last_commit_was_inherited_deletes_nothing_that_the_new_owner_has_finished() -> None:
    """The new owner chose what to finish before that commit was written, and looked again after it."""
    with Play() as play:
        put_checkpoint(play.root, play.job(D, start).end().epoch.attempt(10, 0))
        crashed, ledger = Attempt(15, f"1-{D}-0"), Ledger(Latest(1))
        put_shards(play.root, crashed)
        put_journal(play.disk("disk-b"), crashed)
        old = play.job(A, train, ledger).until("create", keys.MANIFESTS, ending="2-aaaaaaaa-0.json")
        new = play.job(B, start, disk="disk-b").until("create", crashed.manifest)
        old.step()
        settled = new.end()
        old.end()
        assert settled.committed == (Attempt(10, f"1-{D}-0"), crashed, Attempt(20, f"2-{A}-0"))
        assert whole(play.root) == list(settled.committed)
        assert ledger.believed == [Attempt(20, f"2-{A}-0")]
        assert ledger.refused == [Attempt(30, f"2-{A}-0")]


@pytest.mark.parametrize("step", [10, 20])
def test_what_another_job_has_passed_meanwhile_is_not_finished(step: int) -> None:
    """One line of history: what a later job has committed, at whatever step, counts more than an older upload."""
    with Play() as play:
        put_checkpoint(play.root, play.job(A, start).end().epoch.attempt(5, 0))
        crashed = Attempt(15, f"1-{A}-0")
        second = play.job(B, start).end().epoch.attempt(step, 0)
        put_checkpoint(play.root, second)
        put_journal(play.disk("disk-a"), crashed)
        settled = play.job(C, start, disk="disk-a").end()
        assert settled.recovered == ()
        assert settled.committed[-1] == second
        assert play.disk("disk-a").below("data/") == play.disk("disk-a").below(keys.MANIFESTS) == []


# --- deletions that break off -----------------------------------------------------------------------


def test_the_mark_of_a_replaced_job_at_a_commit_that_counts_is_taken_away_and_the_commit_stays() -> None:
    with Play() as play:
        first = play.job(A, start).end()
        crashed = first.epoch.attempt(20, 0)
        put_shards(play.root, crashed)
        put_journal(play.disk("disk-b"), crashed)
        assert play.job(B, start, disk="disk-b").end().recovered == (crashed,)
        play.job(A, deleting, first.epoch, crashed).end()
        assert play.job(C, start).end().committed == (crashed,)
        assert play.root.below(keys.TOMBSTONES) == []
        assert whole(play.root) == [crashed]


def test_a_zombie_in_the_middle_of_a_deletion_hits_nothing_that_counts_two_starts_later() -> None:
    with Play() as play:
        first = play.job(A, start).end()
        crashed = first.epoch.attempt(20, 0)
        put_shards(play.root, crashed)
        put_journal(play.disk("disk-c"), crashed)
        zombie = play.job(A, deleting, first.epoch, crashed).until("delete", keys.DATA)
        play.job(B, start).end()
        assert play.job(C, start, disk="disk-c").end().recovered == ()
        zombie.end()
        assert whole(play.root) == []


def test_a_deletion_begun_while_another_job_finishes_the_attempt_steps_back() -> None:
    with Play() as play:
        first = play.job(A, start).end()
        crashed = first.epoch.attempt(20, 0)
        put_shards(play.root, crashed)
        put_journal(play.disk("disk-b"), crashed)
        second = play.job(B, start, disk="disk-b").until("create", crashed.manifest)
        second.step()
        zombie = play.job(A, deleting, first.epoch, crashed).until("list", keys.EPOCHS)
        third = play.job(C, start).end()
        zombie.end()
        assert refused(second) == [RunBusyError.__name__]
        assert third.committed == (crashed,)
        assert whole(play.root) == [crashed]


@pytest.mark.parametrize("call", ["delete", "list"])
def test_a_retention_that_was_cut_short_is_finished_or_decided_anew(call: str) -> None:
    with Play() as play:
        epoch = play.job(A, start).end().epoch
        old, new = (epoch.attempt(step, 0) for step in (10, 20))
        for attempt in (old, new):
            put_checkpoint(play.root, attempt)
        removal = play.job(A, lambda _, tiers: retain.remove(tiers.remote, old, lambda: True))
        removal.until(call, "data/" if call == "list" else keys.MANIFESTS).kill()
        settled = play.job(B, start).end()
        assert settled.committed == ((new,) if call == "list" else (old, new))
        assert whole(play.root) == list(settled.committed)
        assert play.root.below(keys.TOMBSTONES) == []
        assert play.root.below(old.data) == ([] if call == "list" else [old.shard(0)])


def test_a_start_may_be_cut_short_at_any_call_and_the_next_one_comes_to_the_same() -> None:
    calls = 0
    while True:
        with Play(local=True) as play:
            put_checkpoint(play.root, play.job(D, start).end().epoch.attempt(10, 0))
            crashed, torn = Attempt(30, f"1-{D}-1"), Attempt(40, f"1-{D}-2")
            put_journal(play.disk("disk"), crashed)
            play.disk("disk").put(torn.shard(0), b"torn")
            first = play.job(A, start, disk="disk")
            for _ in range(calls):
                first.step()
            ended = not first.running
            first.kill()
            settled = play.job(B, start, disk="disk").end()
            assert settled.committed == (Attempt(10, f"1-{D}-0"), crashed), calls
            assert whole(play.root) == list(settled.committed), calls
            assert play.disk("disk").below("data/") == [crashed.shard(0)], calls
        if ended:
            break
        calls += 1
    assert calls > 20


# --- listings that lag ------------------------------------------------------------------------------


def test_a_commit_that_a_listing_does_not_show_yet_is_found_again_by_a_restart_on_the_same_disk() -> None:
    with Play() as play:
        newest = play.job(A, start).end().epoch.attempt(20, 0)
        put_checkpoint(play.root, newest)
        put_journal(play.disk("disk"), newest)
        play.root.hidden.add(newest.manifest)
        settled = play.job(B, start, disk="disk").end()
        assert settled.committed == settled.recovered == (newest,)
        play.root.hidden.clear()
        assert whole(play.root) == [newest]


# --- whole lives ------------------------------------------------------------------------------------

PART = parts.part(shardfile.place([shardfile.Piece("w", "U8", (4,), (0,), (4,))]), 0, {})
STAMP = {"created": "2026-01-31T23:59:59Z", "metrics": {}, "versions": {}}


class SmallShard:
    """A shard that is written when it is asked for."""

    seconds, ended = 0.0, True

    def __init__(self, tiers: Tiers, attempt: Attempt) -> None:
        self._tiers, self._attempt = tiers, attempt

    def open(self) -> None:
        pass

    def refuse(self, error: BaseException) -> None:
        pass

    def record(self, timeout_s: float) -> ShardRecord:
        record, content = turns.shard(self._attempt)
        self._tiers.local.put(record.path, content)
        return record


class Twin(Place):
    """A disk whose content another node of the job gets as well, and keeps."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.other: Place | None = None

    def create(self, key: str, data: bytes) -> bool:
        if self.other is not None:
            self.other.objects.setdefault(key, data)
        return super().create(key, data)

    def put(self, key: str, data: bytes) -> None:
        if self.other is not None:
            self.other.objects.setdefault(key, data)
        super().put(key, data)


class FullStore:
    """A run root that takes a shard and then says that it is full."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put_file(self, key: str, path: Path) -> None:
        self._store.put_file(key, path)
        raise StoreFullError("put_file", key, "simulated")


@dataclass
class Ledger:
    """What the jobs of a play have been told, and have done.

    Attributes:
        believed: Commits that were confirmed, or finished by a start that went well.
        refused: Attempts whose job heard that it was replaced.
        finished: Attempts whose manifest another job has written: their upload was finished.
        deleted: Attempts whose manifest somebody has deleted.
    """

    keep: Keep
    believed: list[Attempt] = field(default_factory=list)
    refused: list[Attempt] = field(default_factory=list)
    finished: set[Attempt] = field(default_factory=set)
    deleted: set[Attempt] = field(default_factory=set)

    def step(self, turn: Turn, place: Place) -> None:
        """Let a job make its next call, and look at what a reader sees after it."""
        call, key = turn.at
        attempt = keys.attempt_of(key) if key.startswith(keys.MANIFESTS) else None
        if attempt is not None and call == "delete":
            self.deleted.add(attempt)
        if attempt is not None and call == "create" and attempt.epoch.token != turn.name:
            self.finished.add(attempt)
        told = len(self.believed) + len(self.refused)
        turn.step()
        if call in {"create", "put", "put_file", "delete"} or told != len(self.believed) + len(self.refused):
            self.check(place)

    def check(self, place: Place) -> None:
        counting = discover.committed(place)
        for attempt in counting:
            if attempt not in self.deleted or attempt == counting[-1]:
                discover.valid(place, attempt)
        if self.believed:
            assert counting, "there are no commits any more"
            assert counting[-1].step >= max(self.believed).step, "the newest commit is older than a confirmed one"
        if isinstance(self.keep, Everything):
            assert set(self.believed) <= set(counting), "a commit that somebody believed in does not count any more"
        assert not (set(self.refused) & set(counting)) - self.finished, "a refused manifest counts"


def train(job: Job, tiers: Tiers, ledger: Ledger, full: Collection[int] = ()) -> None:
    """A job that takes over and saves two steps; its run root is full at some of them."""
    job.group = Group(rank=0, world_size=1, namespace=job.incarnation, timeout_s=9)
    try:
        settled = settle(job, tiers, MEETING)
    except DisagreementError as err:
        if {failure.error for failure in err.failures} == {RunBusyError.__name__}:
            return
        raise
    ledger.believed += settled.recovered
    run = opened(tiers, settled)
    catalog = Catalog({attempt.step: attempt for attempt in settled.committed})
    life = Life(job, run, Options(keep=ledger.keep), Events(rank=0, observer=None), catalog)
    newest = max((attempt.step for attempt in settled.committed), default=0)
    for number in range(2):
        run.remote = FullStore(tiers.remote) if number in full else tiers.remote  # type: ignore[assignment]
        attempt = settled.epoch.attempt(newest + 10 * number + 10, 0)
        if isinstance(save_once(life, tiers, attempt, ledger), FencedError):
            ledger.refused.append(attempt)
            return


def save_once(life: Life, tiers: Tiers, attempt: Attempt, ledger: Ledger) -> SaveError | None:
    proposal = ack.Proposal(step=attempt.step, said={}, part=PART, known_layout=life.known_layout(PART), stamp=STAMP)
    save = Save(
        key=attempt,
        pending=PendingSave(*attempt),
        began=time.perf_counter(),
        proposal=proposal,
        shard=SmallShard(tiers, attempt),
    )

    def told(future: Future[None]) -> None:
        if future.exception() is None:
            ledger.believed.append(attempt)

    save.pending.committed.add_done_callback(told)
    return life.live(save)


STOPS = [
    "", "create manifests/order", "create manifests/epochs", "create tombstones", "delete", "delete data", "list data",
    "list manifests", "list tombstones", "put_file", "get manifests/order", "its end",
]  # fmt: skip
SCENES = st.tuples(
    st.sampled_from([0, 0, 1, 1, 2, 2, 3]), st.sampled_from(STOPS), st.sampled_from([False] * 6 + [True])
)


@settings(max_examples=100)
@given(
    scenes=st.lists(SCENES, min_size=3, max_size=10),
    tokens=st.permutations([A, B, C, "eeeeeeee"]),
    full=st.lists(st.sampled_from([(), (0,), (1,)]), min_size=4, max_size=4),
    keep=st.sampled_from([Everything(), Latest(1)]),
    crashed=st.booleans(),
)
def test_whatever_the_order_of_four_jobs_calls_no_commit_is_lost_and_none_is_torn(
    scenes: list[tuple[int, str, bool]],
    tokens: list[str],
    full: list[tuple[int, ...]],
    keep: Keep,
    crashed: bool,  # noqa: FBT001
) -> None:
    """Each scene is one job's: it runs until it is about to make a certain call, and may be killed there."""
    ledger = Ledger(keep)
    with Play(atomic=False) as play:
        twins = [Twin(f"disk-{number}") for number in range(4)]
        for twin, other in zip(twins, [*twins[1:], twins[0]], strict=True):
            twin.other = other
            play.put_in(twin)
        if crashed:
            play.job(D, train, ledger).end()
            put_journal(twins[1], Attempt(30, f"1-{D}-0"))
        jobs: dict[int, Turn] = {}
        for number, stop, dies in scenes:
            job = jobs.get(number) or play.job(tokens[number], train, ledger, full[number], disk=f"disk-{number}")
            jobs[number] = job
            while job.running:
                ledger.step(job, play.root)
                if not stop or " ".join(job.at).startswith(stop):
                    break
            if dies:
                job.kill()
        for _, job in sorted(jobs.items()):
            while job.running:
                ledger.step(job, play.root)
            if job.error is not None:
                raise job.error
        play.job("ffffffff", train, ledger).end()
        ledger.check(play.root)
        assert ledger.believed
