"""Who owns a run root: whatever the order of two jobs' store calls, they never disagree about a commit."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dcpsvc import fence
from dcpsvc.errors import FencedError, RootError, RunBusyError, StoreError, StoreUnavailableError
from dcpsvc.fence import Verdict
from dcpsvc.format import keys
from dcpsvc.format.epochs import Claim, Inheritance
from dcpsvc.format.keys import Attempt, Epoch
from dcpsvc.ranks.rendezvous import DisagreementError
from dcpsvc.stages import commit, discover, retain
from dcpsvc.stages.retain import Removal
from dcpsvc.tiers import Tiers
from tests.unit.turns import MEETING, RUN_ID, Place, Play, Turn, at_once, manifest, put_checkpoint, put_shards, solo

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.ranks.job import Job
    from dcpsvc.storage.memory import MemoryStore

A, B, C = "aaaaaaaa", "bbbbbbbb", "cccccccc"


def describe(token: str) -> Callable[[int], Claim]:
    return lambda number: Claim(epoch=Epoch(number, token), host=f"host-of-{token}", pid=77, created="now")


def claimed(store: MemoryStore, token: str) -> Epoch:
    return fence.claim(store, describe(token)).epoch


def claiming(job: Job, tiers: Tiers) -> Epoch:
    return claimed(tiers.remote, job.incarnation)


def inheriting(job: Job, tiers: Tiers) -> Epoch:
    """What a start does, as far as the fence is concerned."""
    epoch = claiming(job, tiers)
    fence.inherit(tiers.remote, epoch, discover.committed(tiers.remote))
    return epoch


def publish(job: Job, tiers: Tiers, attempt: Attempt) -> commit.Published:
    return commit.publish(
        job, f"save/{attempt}", manifest(attempt), tiers.remote, meeting=MEETING, within=at_once, created=lambda: None
    )


def owned(place: Place, token: str) -> Epoch:
    """A run root that a job has taken over, for tests that begin there."""
    epoch = claimed(place, token)
    fence.inherit(place, epoch, discover.committed(place))
    return epoch


# --- claims -----------------------------------------------------------------------------------------


def test_each_claim_is_larger_than_any_before() -> None:
    place = Place()
    assert [claimed(place, token) for token in (B, A, C)] == [Epoch(1, B), Epoch(2, A), Epoch(3, C)]


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("order", [(A, B), (B, A)])
def test_of_two_jobs_that_claim_the_same_number_the_one_with_the_larger_token_wins(
    order: tuple[str, str],
    atomic: bool,  # noqa: FBT001
) -> None:
    with Play(atomic=atomic) as play:
        jobs = {token: play.job(token, claiming).until("create") for token in order}
        for token in order:
            jobs[token].step()
        assert jobs[B].end() == Epoch(1, B)
        with pytest.raises(RunBusyError, match=f"job {B} .* has just taken it over"):
            jobs[A].end()


def test_a_job_that_comes_a_moment_later_with_the_same_number_and_a_larger_token_takes_over() -> None:
    with Play() as play:
        late = play.job(B, claiming).until("create")
        assert play.job(A, inheriting).end() == Epoch(1, A)
        assert late.end() == Epoch(1, B)
        assert fence.successor(play.root, Epoch(1, A)).startswith(f"job {B} (epoch 1, process 77 on host-of-{B}")


@given(st.permutations([A, B, C, "dddddddd"]), st.lists(st.integers(0, 3), max_size=30), st.booleans())
@settings(max_examples=60)
def test_of_jobs_that_claim_at_once_the_one_with_the_largest_claim_wins_and_no_two_get_one_epoch(
    tokens: list[str],
    order: list[int],
    atomic: bool,  # noqa: FBT001
) -> None:
    with Play(atomic=atomic) as play:
        jobs = [play.job(token, claiming) for token in tokens]
        won: list[Epoch] = []
        for number in [*order, *sorted([0, 1, 2, 3] * 40)]:
            if jobs[number].running and not jobs[number].step():
                if jobs[number].error is None:
                    won.append(jobs[number].value)
                    assert won[-1] == max(won), "a job was told that it owns what another owned already"
                else:
                    assert isinstance(jobs[number].error, RunBusyError)
        largest = max(found[0] for key in play.root.below(keys.EPOCHS) if (found := keys.epoch_of(key)))
        assert won[-1] == largest


def test_files_that_are_no_claims_of_ours_are_passed_over() -> None:
    place = Place()
    for name in ("7.cafecafe.json", "00000009.CAFECAFE.json", "readme.txt", "100000000.cafecafe.json"):
        place.put(f"{keys.EPOCHS}{name}", b"x")
    assert claimed(place, A) == Epoch(1, A)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"x" * 100_000, Claim(epoch=Epoch(5, C), host="", pid=1, created="").dumps()]
)
def test_a_claim_that_cannot_be_read_is_a_claim_all_the_same(content: bytes) -> None:
    place = Place()
    mine = claimed(place, A)
    place.put(Epoch(4, B).claim, content)
    assert fence.successor(place, mine) == f"job {B} (epoch 4)"
    assert claimed(place, C) == Epoch(5, C)


def test_the_last_number_there_is_cannot_be_claimed_past() -> None:
    place = Place()
    place.put(Epoch(keys.MAX_EPOCH, B).claim, b"x")
    with pytest.raises(RunBusyError, match="99999999"):
        claimed(place, A)


class Truncating(Place):
    """Keeps half of what it is given, and says that all is well."""

    def create(self, key: str, data: bytes) -> bool:
        return super().create(key, data[: len(data) // 2])


def test_a_claim_or_an_inheritance_that_does_not_read_back_ends_the_start() -> None:
    with pytest.raises(StoreError, match="read back"):
        claimed(Truncating(), A)
    with pytest.raises(StoreError, match="read back"):
        fence.inherit(Truncating(), Epoch(1, A), [])


def test_an_answer_that_was_lost_does_not_make_a_job_lose_against_itself() -> None:
    place = Place()
    assert place.create(Epoch(1, A).claim, describe(A)(1).dumps())
    fence.inherit(place, Epoch(1, A), [])
    fence.inherit(place, Epoch(1, A), [])
    assert fence.successor(place, Epoch(1, A)) == ""


# --- what is written down ---------------------------------------------------------------------------


def test_the_files_of_long_gone_owners_go_and_the_newest_stay() -> None:
    place = Place()
    epochs = [owned(place, f"{number:08x}") for number in range(1, 9)]
    left = {found[0].number for key in place.below(keys.EPOCHS) if (found := keys.epoch_of(key))}
    assert left == {5, 6, 7, 8}
    assert fence.newest_inheritance(place, place.list(keys.EPOCHS)) == Inheritance(
        epoch=epochs[-1], attempts=frozenset()
    )


def test_the_late_inheritance_of_a_replaced_job_changes_nothing() -> None:
    with Play() as play:
        old = play.job(B, inheriting).until("create", keys.EPOCHS, ending="inherited.json")
        new = play.job(A, inheriting).end()
        play.root.put(new.attempt(1, 0).manifest, manifest(new.attempt(1, 0)).dumps())
        assert old.end() == Epoch(1, B)
        assert discover.committed(play.root) == [new.attempt(1, 0)]
        assert fence.successor(play.root, new) == ""


def test_a_damaged_inheritance_is_passed_over_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    place = Place()
    one = owned(place, A)
    two = owned(place, B)
    place.put(two.inheritance, b"{}")
    with caplog.at_level(logging.WARNING):
        found = fence.newest_inheritance(place, place.list(keys.EPOCHS))
    assert found is not None
    assert found.epoch == one
    assert two.inheritance in caplog.text


def test_where_no_job_has_taken_over_there_is_no_inheritance() -> None:
    place = Place()
    place.put(Epoch(1, A).claim, b"x")
    assert fence.newest_inheritance(place, place.list(keys.EPOCHS)) is None


class Blind(Place):
    """Cannot be read at the moment."""

    def get(self, key: str, *, max_nbytes: int) -> bytes:
        raise StoreUnavailableError("get", key, "503 SlowDown")


def test_an_inheritance_that_cannot_be_asked_for_is_an_error_and_never_none() -> None:
    place = Blind()
    place.put(Epoch(1, A).inheritance, Inheritance(epoch=Epoch(1, A), attempts=frozenset()).dumps())
    with pytest.raises(StoreUnavailableError):
        fence.newest_inheritance(place, place.list(keys.EPOCHS))
    place.put(Attempt(1, "old-0").manifest, b"x")
    with pytest.raises(StoreUnavailableError):
        discover.committed(place)


# --- who owns it ------------------------------------------------------------------------------------


def test_nobody_succeeds_the_newest() -> None:
    place = Place()
    first, second = owned(place, A), owned(place, B)
    assert fence.successor(place, second) == ""
    assert fence.successor(place, first) == f"job {B} (epoch 2, process 77 on host-of-{B}, now)"


@pytest.mark.parametrize("what", ["moved", "emptied but for an older claim"])
def test_a_root_from_which_the_own_claim_has_gone_is_not_ours_any_more(what: str) -> None:
    place = Place()
    old, mine = owned(place, A), owned(place, B)
    for key in place.below(keys.EPOCHS):
        if what == "moved" or not key.startswith(old.claim.removesuffix(".json")):
            place.delete(key)
    with pytest.raises(RootError, match="moved or emptied"):
        fence.successor(place, mine)
    with pytest.raises(RootError, match="moved or emptied"):
        fence.verdict(place, mine.attempt(1, 0))


@pytest.mark.parametrize(
    ("inheritances", "counts"),
    [
        ({}, None),  # C has claimed and said nothing yet
        ({B: True}, None),  # what B said is not final: C may have looked before, or after
        ({B: False}, None),
        ({C: True}, True),
        ({C: False}, False),
        ({B: True, C: False}, False),
        ({B: False, C: True}, True),
    ],
)
def test_only_what_the_newest_claimant_has_written_down_is_final(
    inheritances: dict[str, bool],
    counts: bool | None,  # noqa: FBT001
) -> None:
    place = Place()
    mine = owned(place, A).attempt(1, 0)
    epochs = {token: claimed(place, token) for token in (B, C)}
    for token, named in inheritances.items():
        fence.inherit(place, epochs[token], [mine] if named else [])
    found = fence.verdict(place, mine)
    assert found.counts is counts
    assert C in found.theirs


def test_a_manifest_of_the_owner_counts_and_nobody_has_taken_over() -> None:
    place = Place()
    assert fence.verdict(place, owned(place, A).attempt(1, 0)) == Verdict(counts=True, theirs="")


# --- two jobs at once -------------------------------------------------------------------------------


def test_a_job_that_was_replaced_writes_no_manifest_and_names_both() -> None:
    with Play() as play:
        attempt = play.job(A, inheriting).end().attempt(1, 0)
        play.job(B, inheriting).end()
        with pytest.raises(DisagreementError) as caught:
            play.job(A, publish, attempt).end()
        (failure,) = caught.value.failures
        assert failure.error == FencedError.__name__
        for word in (A, "epoch 1", B, "epoch 2", f"host-of-{B}", "process 77"):
            assert word in failure.text
        assert attempt.manifest not in play.root.objects


def test_a_zombie_that_writes_its_manifest_after_the_new_owner_has_looked_is_refused_and_it_does_not_count() -> None:
    with Play() as play:
        attempt = play.job(A, inheriting).end().attempt(1, 0)
        zombie = play.job(A, publish, attempt).until("create", attempt.manifest)
        play.job(B, inheriting).end()
        with pytest.raises(DisagreementError) as caught:
            zombie.end()
        assert [failure.error for failure in caught.value.failures] == [FencedError.__name__]
        assert attempt.manifest in play.root.objects
        assert discover.committed(play.root) == []


def test_a_manifest_that_the_new_owner_has_found_is_committed_though_its_job_is_replaced() -> None:
    with Play() as play:
        attempt = play.job(A, inheriting).end().attempt(1, 0)
        put_shards(play.root, attempt)
        zombie = play.job(A, publish, attempt).until("get", attempt.manifest)
        play.job(B, inheriting).end()
        published = zombie.end()
        assert published.unknown == ""
        assert B in published.replaced
        assert discover.committed(play.root) == [attempt]


def finished_elsewhere(play: Play, attempt: Attempt) -> Turn:
    """A job about to write a manifest that the next one writes, too, and counts in."""
    zombie = play.job(A, publish, attempt).until("create", attempt.manifest)
    put_checkpoint(play.root, attempt)
    play.job(B, inheriting).end()
    return zombie


def test_a_manifest_that_comes_after_the_new_owner_has_deleted_the_checkpoint_is_taken_back() -> None:
    with Play() as play:
        attempt = play.job(A, inheriting).end().attempt(1, 0)
        zombie = finished_elsewhere(play, attempt)
        assert retain.remove(play.root, attempt, lambda: True) is Removal.DONE
        with pytest.raises(DisagreementError) as caught:
            zombie.end()
        assert [failure.error for failure in caught.value.failures] == [FencedError.__name__]
        assert discover.committed(play.root) == play.root.below(attempt.data) == []


@pytest.mark.parametrize("there", [[0, 1], [1]])
def test_a_manifest_with_anything_behind_it_is_not_taken_back(there: list[int]) -> None:
    """A listing may lie behind, and of a checkpoint that was damaged people want to know."""
    with Play() as play:
        attempt = play.job(A, inheriting).end().attempt(1, 0)
        zombie = finished_elsewhere(play, attempt)
        play.root.delete(attempt.manifest)
        retain.remove_data(play.root, attempt)
        put_shards(play.root, attempt, there)
        play.root.hidden |= {attempt.shard(0)} if 0 in there else set()
        assert B in zombie.end().replaced
        assert discover.committed(play.root) == [attempt]


class Usurped(Place):
    """Another job takes it over as soon as a manifest is written, and nobody can ask for a shard."""

    def create(self, key: str, data: bytes) -> bool:
        made = super().create(key, data)
        if keys.attempt_of(key) is not None:
            owned(self, B)
        return made

    def size(self, key: str) -> int:
        if keys.is_shard(key):
            raise StoreUnavailableError("size", key, "try again later")
        return super().size(key)


def test_where_nobody_can_tell_whether_the_checkpoint_was_deleted_the_commit_is_unknown_and_stays() -> None:
    place = Usurped()
    attempt = owned(place, A).attempt(1, 0)
    tiers = Tiers(run_id=RUN_ID, remote=place, local=Place(), local_path=Path("/nowhere"))
    assert "the manifest stands" in publish(solo(A), tiers, attempt).unknown
    assert discover.committed(place) == [attempt]


def test_while_the_new_owner_has_not_said_what_it_inherits_nobody_knows() -> None:
    with Play() as play:
        attempt = play.job(A, inheriting).end().attempt(1, 0)
        zombie = play.job(A, publish, attempt).until("create", attempt.manifest)
        new = play.job(B, inheriting).until("create", keys.EPOCHS, ending="inherited.json")
        assert B in zombie.end().unknown
        new.end()
        assert discover.committed(play.root) == []


@pytest.mark.parametrize("sees", [B, C])
def test_with_two_new_owners_on_their_way_only_the_newest_ones_list_decides(sees: str) -> None:
    """B and C look at different moments: one before the manifest is written, one after."""
    with Play() as play:
        attempt = play.job(A, inheriting).end().attempt(1, 0)
        zombie = play.job(A, publish, attempt).until("create", attempt.manifest)
        looks = {token: play.job(token, inheriting).until("list", ending=keys.MANIFESTS) for token in (B, C)}
        other = C if sees == B else B
        looks[other].until("create", keys.EPOCHS, ending="inherited.json")
        zombie.step()
        looks[sees].until("create", keys.EPOCHS, ending="inherited.json")
        looks[B].end()
        published = zombie.end()
        assert C in published.unknown
        looks[C].end()
        assert discover.committed(play.root) == ([attempt] if sees == C else [])


@dataclass
class Ledger:
    """What the jobs of a play on a run root have been told."""

    root: Place
    confirmed: list[Attempt] = field(default_factory=list)
    fenced: list[Attempt] = field(default_factory=list)

    def check(self) -> None:
        """After every call of every job, as a reader sees it."""
        counting = discover.committed(self.root)
        assert set(self.confirmed) <= set(counting), "a commit that somebody believed in does not count any more"
        assert not set(self.fenced) & set(counting), "a manifest counts that its job was told never will"
        newest = max((attempt.step for attempt in counting), default=-1)
        confirmed = max((attempt.step for attempt in self.confirmed), default=-1)
        assert newest >= confirmed, "the newest checkpoint is older than a confirmed commit"


def train(job: Job, tiers: Tiers, ledger: Ledger, saves: int) -> None:
    """A job from its start to its end, or to the moment in which it hears that it was replaced."""
    try:
        epoch = inheriting(job, tiers)
    except RunBusyError:
        return
    newest = max((attempt.step for attempt in discover.committed(tiers.remote)), default=0)
    for step in range(newest + 1, newest + saves + 1):
        attempt = epoch.attempt(step, 0)
        put_shards(ledger.root, attempt)
        try:
            published = publish(job, tiers, attempt)
        except DisagreementError as err:
            if [failure.error for failure in err.failures] != [FencedError.__name__]:
                raise
            ledger.fenced.append(attempt)
            return
        if not published.unknown:
            ledger.confirmed.append(attempt)
        if published.unknown or published.replaced:
            return


TURNS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12)), max_size=16)
DEATHS = st.dictionaries(st.integers(0, 2), st.integers(0, 30), max_size=1)


def play_out(play: Play, jobs: list[Turn], turns: list[tuple[int, int]], deaths: dict[int, int], check: Any) -> None:
    """Each turn is so many calls of one job; then the jobs end one after the other. Some die on the way."""
    for number, calls in [*turns, *((number, 10_000) for number in range(len(jobs)))]:
        for _ in range(calls):
            if jobs[number].calls >= deaths.get(number, 10_000):
                jobs[number].kill()
            if not jobs[number].running:
                break
            jobs[number].step()
            check()
    for job in jobs:
        if job.error is not None:
            raise job.error


@settings(max_examples=150)
@given(TURNS, DEATHS, st.booleans(), st.permutations([A, B, C]))
@example([(0, 12), (1, 5), (0, 1), (2, 9)], {}, True, [A, B, C])  # noqa: FBT003
def test_whatever_the_order_of_three_jobs_calls_what_was_confirmed_counts_and_what_was_refused_never_does(
    turns: list[tuple[int, int]],
    deaths: dict[int, int],
    atomic: bool,  # noqa: FBT001
    tokens: list[str],
) -> None:
    with Play(atomic=atomic) as play:
        ledger = Ledger(play.root)
        jobs = [play.job(token, train, ledger, 2) for token in tokens]
        play_out(play, jobs, turns, deaths, ledger.check)
        play.job("eeeeeeee", train, ledger, 1).end()
        ledger.check()
        assert ledger.confirmed
