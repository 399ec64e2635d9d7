"""What is left of attempts that are no checkpoints, and what looks like it and is one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dcpsvc.errors import StoreUnavailableError
from dcpsvc.format.keys import Attempt, Epoch
from dcpsvc.stages import discover, retain
from dcpsvc.stages.retain import Removal
from tests.unit.turns import Place, Play, manifest, put_checkpoint, put_shards

OLD, OLDER = Epoch(2, "bbbbbbbb"), Epoch(1, "aaaaaaaa")
OURS = Epoch(3, "cccccccc")


def put_manifest(place: Place, attempt: Attempt) -> None:
    place.put(attempt.manifest, manifest(attempt).dumps())


def test_what_older_jobs_left_and_nobody_inherited_is_debris() -> None:
    place = Place()
    torn, fenced, whole = (OLDER.attempt(step, 0) for step in (1, 2, 3))
    put_shards(place, torn)
    put_manifest(place, fenced)
    for attempt in (whole, OURS.attempt(4, 0), OURS.attempt(5, 1), Attempt(6, "not-ours")):
        put_checkpoint(place, attempt)
    assert retain.debris(place, OURS, [whole]) == [torn, fenced]


def test_a_manifest_that_came_back_after_its_checkpoint_was_deleted_is_debris_though_it_was_inherited() -> None:
    """A write that was on its way all the time: no store can prevent that."""
    place = Place()
    whole, deleted = OLD.attempt(2, 0), OLDER.attempt(1, 0)
    for attempt in (whole, deleted):
        put_checkpoint(place, attempt)
    assert retain.remove(place, deleted, lambda: True) is Removal.DONE
    put_manifest(place, deleted)
    inherited = discover.committed(place)
    assert inherited == [deleted, whole]
    assert retain.debris(place, OURS, inherited) == [deleted]
    retain.finish_removal(place, deleted)
    assert discover.committed(place) == [whole]
    assert retain.debris(place, OURS, inherited) == []


def test_a_checkpoint_of_which_some_files_are_gone_is_damaged_and_no_debris() -> None:
    place = Place()
    damaged = OLD.attempt(1, 0)
    put_checkpoint(place, damaged, world_size=2)
    place.delete(damaged.shard(0))
    assert retain.debris(place, OURS, [damaged]) == []


def test_a_checkpoint_all_of_whose_files_are_those_of_another_one_is_no_debris() -> None:
    place = Place()
    owner, user = OLDER.attempt(1, 0), OLD.attempt(2, 0)
    put_checkpoint(place, owner)
    place.put(user.manifest, replace(manifest(user), shards=manifest(owner).shards).dumps())
    assert retain.debris(place, OURS, [owner, user]) == []
    place.delete(owner.shard(0))
    assert retain.debris(place, OURS, [user]) == [owner, user]


def test_a_checkpoint_whose_files_a_listing_does_not_show_yet_is_no_debris() -> None:
    """As the one that this very start has finished."""
    with Play() as play:
        recovered = OLD.attempt(1, 0)
        put_checkpoint(play.root, recovered)
        play.root.hidden.add(recovered.shard(0))
        look = play.job(OURS.token, lambda _, tiers: retain.debris(tiers.remote, OURS, [recovered]))
        assert look.end() == []


class Blind(Place):
    """Nothing can be asked about a file."""

    def size(self, key: str) -> int:
        raise StoreUnavailableError("size", key, "try again later")


def test_where_nobody_can_tell_whether_the_files_are_gone_nothing_is_debris() -> None:
    place = Blind()
    inherited = OLD.attempt(1, 0)
    put_manifest(place, inherited)
    with pytest.raises(StoreUnavailableError):
        retain.debris(place, OURS, [inherited])
