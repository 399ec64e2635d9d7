"""A host that is cut off and comes back: both sides hear of it in time, train on, and commit the next save together."""

import time

import pytest
import torch

import dcpsvc
from dcpsvc import Point
from tests.hosts.cluster import DEADLINE_S
from tests.hosts.trainer import ALL_GATHER
from tests.ranks.models import committed, step_files

NEAR, FAR = 0, 1
"""The host of the store and of rank 0, and the one that is cut off."""


def heal_and_save(job, host=FAR):
    job.hosts.heal(host)
    job.answered()
    return job.saved()


def ranks(processes):
    return [process.rank for process in processes]


def assert_alone(error, rank):
    """What a rank says that reaches nobody: it speaks for itself only."""
    if error.type == "CommitUnknownError":
        assert f"rank {rank} failed in control: NoAnswerError" in error["reason"]
    else:
        assert error.type == "SaveFailedError"
        assert [(failure["rank"], failure["error"]) for failure in error["failures"]] == [(rank, "NoAnswerError")]


@pytest.mark.parametrize("world", [2, 4])
def test_a_host_cut_off_before_a_save_is_named_by_the_others_and_when_it_is_back_all_commit_the_next_save(start, world):
    job = start(world=world)
    first = job.saved()
    at = job.cut_off(FAR)
    step = job.save()
    errors = job.faulted("a host is cut off before a save", at, step)

    for rank in ranks(job.on(NEAR)):
        assert errors[rank].type == "RanksMissingError"
        assert errors[rank]["phase"] == "plan"
        assert list(errors[rank]["missing"]) == ranks(job.on(FAR))
    for rank in ranks(job.on(FAR)):
        assert_alone(errors[rank], rank)
        assert f"step {first} remains the newest commit" in errors[rank].text
    job.trains_on()
    assert committed(job.root) == [first]
    assert [name for name in step_files(job.root, step) if not name.startswith("tombstones/")] == []
    later = heal_and_save(job)
    assert committed(job.root) == [first, later]


@pytest.mark.parametrize("world", [2, 3])
def test_a_host_cut_off_in_the_middle_of_our_all_gather_fails_the_save_everywhere_and_the_group_is_replaced(
    start, world
):
    job = start(world=world)
    first = job.saved()
    job.hold(job.on(FAR), ALL_GATHER)
    step = job.save()
    job.held(job.on(FAR), ALL_GATHER)  # the others are inside
    at = job.cut_off(FAR)
    job.release(job.on(FAR), ALL_GATHER)
    errors = job.faulted("a host is cut off during the all_gather", at, step, 2 * DEADLINE_S)

    for rank in ranks(job.on(NEAR)):
        assert errors[rank].type == "RanksMissingError"
        assert list(errors[rank]["missing"]) == ranks(job.on(FAR))
    for rank in ranks(job.on(FAR)):
        assert_alone(errors[rank], rank)
    job.trains_on()
    assert committed(job.root) == [first]
    later = heal_and_save(job)
    assert committed(job.root) == [first, later]
    assert {seen["generation"] for seen in job.look()} == {1}


@pytest.mark.parametrize("point", [Point.PLAN_AGREED, Point.ACKED_LOCAL, Point.ACKED_REMOTE])
def test_a_host_cut_off_on_the_way_to_the_commit_is_named_by_the_others_and_nothing_is_published(start, point):
    job = start(world=2)
    first = job.saved()
    job.hold(job.on(FAR), point)
    step = job.save()
    job.held(job.on(FAR), point)
    at = job.cut_off(FAR)
    job.release(job.on(FAR), point)
    errors = job.faulted(f"a host is cut off at {point}", at, step)

    assert_alone(errors[1], 1)
    if point == Point.ACKED_REMOTE:
        assert errors[0].type == "CommitUnknownError"
        assert errors[0]["reason"] == "ranks (1,) fell silent"
    else:
        assert errors[0].type == "RanksMissingError"
        assert errors[0]["phase"] == {Point.PLAN_AGREED: "local", Point.ACKED_LOCAL: "remote"}[point]
        assert list(errors[0]["missing"]) == [1]
    job.trains_on()
    assert committed(job.root) == [first]
    later = heal_and_save(job)
    assert committed(job.root) == [first, later]


def test_a_host_cut_off_while_the_manifest_is_written_says_that_it_does_not_know_and_the_checkpoint_is_whole(start):
    job = start(world=2)
    first = job.saved()
    job.hold(job.on(NEAR), Point.MANIFEST_CREATED)
    step = job.save()
    job.held(job.on(NEAR), Point.MANIFEST_CREATED)
    at = job.cut_off(FAR)
    far = job.ranks[1].hear("ended", step=step)
    job.release(job.on(NEAR), Point.MANIFEST_CREATED)

    job.noted("a host is cut off at manifest-created", at, {1: far})
    assert_alone(far["raised"], 1)
    assert far["raised"].type == "CommitUnknownError"
    assert job.ranks[0].hear("ended", step=step)["raised"] is None
    job.trains_on()
    assert committed(job.root) == [first, step]
    model = torch.nn.Linear(256, 64)
    assert dcpsvc.load(job.root, {"model": model}, step=step) == step
    assert bool((model.weight == step).all())
    later = heal_and_save(job)
    assert committed(job.root) == [first, step, later]


def test_two_hosts_that_lost_each_other_but_not_the_store_fail_in_time_and_commit_when_they_are_back(start):
    job = start(world=3, on=3)
    first = job.saved()
    job.hosts.part(1, 2)
    at = time.monotonic()
    gathering = job.faulted("two of three hosts cannot reach each other: all_gather", at, job.save(), 2 * DEADLINE_S)
    connecting = job.faulted("two of three hosts cannot reach each other: new group", at, job.save(), 2 * DEADLINE_S)

    for errors in (gathering, connecting):
        assert {error.type for error in errors.values()} == {"SaveFailedError"}
        assert len({error.text for error in errors.values()}) == 1
    job.trains_on()
    assert committed(job.root) == [first]
    job.hosts.unite(1, 2)
    later = job.saved()
    assert committed(job.root) == [first, later]
    assert {seen["generation"] for seen in job.look()} == {2}


def test_a_host_that_gave_up_a_meeting_and_came_back_is_not_waited_for_there(start):
    job = start(world=2, sync_timeout_s=10.0)
    first = job.saved()
    job.hold(job.on(FAR), Point.ACKED_LOCAL)
    step = job.save()
    job.held(job.on(FAR), Point.ACKED_LOCAL)
    at = job.cut_off(FAR)
    job.unanswered(job.on(FAR))  # so the next call fails at once, and is never sent
    job.release(job.on(FAR), Point.ACKED_LOCAL)
    far = job.ranks[1].hear("ended", step=step)
    job.hosts.heal(FAR)
    near = job.ranks[0].hear("ended", step=step)

    errors = job.noted("a host is cut off for a moment at acked-local", at, {0: near, 1: far}, 1.25 * 10.0)
    assert_alone(errors[1], 1)
    assert errors[0].type == "RanksMissingError"
    assert errors[0]["phase"] == "remote"
    assert list(errors[0]["missing"]) == [1]
    job.answered()
    later = job.saved()
    assert committed(job.root) == [first, later]
