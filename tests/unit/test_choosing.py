"""Which commit is loaded: found in one listing, newest first, and older jobs' manifests only as far as they count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc import choosing, fence
from dcpsvc.format.epochs import Claim
from dcpsvc.format.keys import Attempt, Epoch
from dcpsvc.listed import Listed
from dcpsvc.storage.paging import Page
from tests.unit.turns import Place, manifest

if TYPE_CHECKING:
    from collections.abc import Callable

TOKENS = ("aaaaaaaa", "bbbbbbbb", "cccccccc")


class Counting(Place):
    """Notes what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def get(self, key: str, *, max_nbytes: int) -> bytes:
        self.asked.append(f"GET {key}")
        return super().get(key, max_nbytes=max_nbytes)

    def list(self, prefix: str):  # type: ignore[no-untyped-def]
        self.asked.append(f"LIST {prefix}")
        return super().list(prefix)


class Paged(Counting):
    """Lists as S3 does, so many names at a time; a directory bucket lists in no order."""

    def __init__(self, names: int, *, ordered: bool = True) -> None:
        super().__init__()
        self._names, self._ordered = names, ordered

    def list_page(self, prefix: str, after: str) -> Page:
        self.asked.append(f"PAGE {after or 0}")
        found = sorted(Place.list(self, prefix), reverse=not self._ordered)
        begin, end = int(after or 0), int(after or 0) + self._names
        return Page(found[begin:end], str(end) if end < len(found) else "")


def claims(token: str) -> Callable[[int], Claim]:
    return lambda number: Claim(epoch=Epoch(number, token), host="here", pid=1, created="now")


def take_over(place: Place, token: str, inherited: list[Attempt]) -> Epoch:
    epoch = fence.claim(place, claims(token)).epoch
    fence.inherit(place, epoch, inherited)
    return epoch


def commit(place: Place, attempt: Attempt) -> Attempt:
    place.create(attempt.manifest, manifest(attempt).dumps())
    return attempt


def newest(place: Place) -> Attempt | None:
    found = choosing.choose(place, None, look=choosing.told).found
    return found and found.manifest.key


def test_the_newest_commit_of_the_newest_job_is_found_without_reading_what_it_inherited() -> None:
    place = Counting()
    first = take_over(place, TOKENS[0], [])
    old = [commit(place, first.attempt(step, 0)) for step in (1, 2)]
    second = take_over(place, TOKENS[1], old)
    latest = commit(place, second.attempt(3, 0))
    place.asked.clear()
    assert newest(place) == latest
    assert place.asked == ["LIST manifests/", f"GET {latest.manifest}"]


def test_a_newer_step_of_a_job_that_had_been_replaced_is_passed_over() -> None:
    place = Counting()
    first = take_over(place, TOKENS[0], [])
    inherited = commit(place, first.attempt(1, 0))
    second = take_over(place, TOKENS[1], [inherited])
    commit(place, first.attempt(9, 0))  # a zombie's
    assert newest(place) == inherited
    mine = commit(place, second.attempt(2, 0))
    place.asked.clear()
    assert newest(place) == mine
    assert place.asked == ["LIST manifests/", f"GET {second.inheritance}", f"GET {mine.manifest}"]


def test_before_a_new_job_has_committed_its_inheritance_is_read_once() -> None:
    place = Counting()
    first = take_over(place, TOKENS[0], [])
    attempts = [commit(place, first.attempt(step, 0)) for step in range(1, 30)]
    second = take_over(place, TOKENS[1], attempts[:20])
    place.asked.clear()
    assert newest(place) == attempts[19]
    assert place.asked == ["LIST manifests/", f"GET {second.inheritance}", f"GET {attempts[19].manifest}"]


def test_of_a_listing_in_pages_only_the_first_is_asked_for_whatever_the_number_of_commits() -> None:
    place = Paged(10)
    epoch = take_over(place, TOKENS[0], [])
    attempts = [commit(place, epoch.attempt(step, 0)) for step in range(1, 95)]
    place.asked.clear()
    assert newest(place) == attempts[-1]
    assert place.asked == ["PAGE 0", f"GET {attempts[-1].manifest}"]


def test_a_step_that_is_named_is_listed_for_no_further_than_its_page() -> None:
    place = Paged(10)
    epoch = take_over(place, TOKENS[0], [])
    attempts = [commit(place, epoch.attempt(step, 0)) for step in range(1, 95)]
    place.asked.clear()
    found = choosing.choose(place, 80, look=choosing.told).found
    assert found is not None
    assert found.manifest.key == attempts[79]
    assert place.asked == ["PAGE 0", "PAGE 10", f"GET {attempts[79].manifest}"]


def test_claims_that_fill_a_page_are_all_known_before_a_manifest_counts() -> None:
    place = Paged(1)
    first = take_over(place, TOKENS[0], [])
    zombies = [commit(place, first.attempt(step, 0)) for step in range(1, 9)]
    for token in TOKENS[1:]:
        take_over(place, token, zombies[:2])
    assert newest(place) == zombies[1]


def test_a_server_that_lists_in_no_order_is_asked_for_everything() -> None:
    place = Paged(10, ordered=False)
    epoch = take_over(place, TOKENS[0], [])
    attempts = [commit(place, epoch.attempt(step, 0)) for step in range(1, 95)]
    place.asked.clear()
    assert newest(place) == attempts[-1]
    assert place.asked == ["PAGE 0", "LIST manifests/", f"GET {attempts[-1].manifest}"]


@given(st.data())
def test_what_is_chosen_is_the_newest_of_what_counts_whatever_jobs_left(data: st.DataObject) -> None:
    place = Paged(data.draw(st.sampled_from([1, 2, 5, 1000])))
    epochs = [Epoch(number, data.draw(st.sampled_from(TOKENS))) for number in range(1, data.draw(st.integers(1, 4)))]
    made: list[Attempt] = [Attempt(1, "by-hand")] if data.draw(st.booleans()) else []
    made += [
        epoch.attempt(data.draw(st.integers(1, 5)), n) for epoch in epochs for n in range(data.draw(st.integers(0, 3)))
    ]
    for attempt in made:
        commit(place, attempt)
    for epoch in epochs:
        if (how := data.draw(st.sampled_from(["inherits", "damaged", "claims"]))) == "inherits":
            fence.inherit(place, epoch, [one for one in made if data.draw(st.booleans())])
        elif how == "damaged":
            place.put(epoch.inheritance, b"{}")
    entries = place.list("manifests/")
    inheritance = fence.newest_inheritance(place, entries)
    counting = {one for one in made if inheritance is None or inheritance.counts(one)}
    assert set(Listed(place).counting()) == counting
    found = newest(place)
    best = max((one.step, one.epoch.number) for one in counting) if counting else None
    assert (found and (found.step, found.epoch.number)) == best


def test_a_tag_that_came_after_the_commit_counts_unless_the_manifest_is_believed(tmp_path) -> None:
    import dcpsvc

    with dcpsvc.Checkpointer(tmp_path / "root", {"n": [1]}, local=tmp_path / "local", save_last=False) as ckpt:
        ckpt.save(1).wait(30)
        ckpt.save(2).wait(30)
    dcpsvc.record_metrics(tmp_path / "root", 2, {"diverged": 1})
    latest, believed = dcpsvc.latest(tmp_path / "root"), dcpsvc.latest(tmp_path / "root", checked=False)
    assert (latest and latest.step, believed and believed.step) == (1, 2)


def test_a_place_without_a_run_is_refused_and_one_without_commits_has_no_latest(tmp_path) -> None:
    import dcpsvc

    with pytest.raises(dcpsvc.RootError, match=r"run\.json is missing"):
        dcpsvc.latest(tmp_path / "nothing")
    with dcpsvc.Checkpointer(tmp_path / "root", {"n": [1]}, local=tmp_path / "local", save_last=False):
        pass
    assert dcpsvc.latest(tmp_path / "root") is None
