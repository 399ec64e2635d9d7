"""The store of the ranks is cut off, frozen or gone: every rank hears of it in time, trains on, and can close."""

import signal
import time

import pytest

from dcpsvc import Point
from tests.hosts.cluster import SLACK_S, SYNC_S
from tests.ranks.models import committed

FIRST = 0
"""The host of the store, and of the coordinator."""


def assert_closes(job):
    """Bounded, with what became of the last save; only a call that hangs in the store's client is left behind."""
    for closed in job.close():
        assert "SaveError" in closed["raised"].family
        assert closed["seconds"] < 2 * SYNC_S + SLACK_S
        assert set(closed["threads"]) <= {"dcpsvc-ranks-store"}
        assert len(closed["threads"]) <= 2


def assert_speaks_for_itself(error, rank):
    assert error.type in {"SaveFailedError", "CommitUnknownError"}
    assert f"rank {rank} failed in control: NoAnswerError" in error.text


@pytest.mark.parametrize("how", ["cut off", "killed"])
@pytest.mark.parametrize("point", [None, Point.ACKED_LOCAL])
def test_without_the_host_of_the_store_and_the_coordinator_the_others_fail_in_time_train_on_and_close(
    start, how, point
):
    job = start(world=3, on=3)
    first = job.saved()
    if point is None:
        at = job.kill(FIRST) if how == "killed" else job.cut_off(FIRST)
        step = job.save()
    else:
        held = job.on(1, 2)
        job.hold(held, point)
        step = job.save()
        job.held(held, point)
        at = job.kill(FIRST) if how == "killed" else job.cut_off(FIRST)
        job.release(held, point)
    errors = job.faulted(f"the host of the store is {how} {f'at {point}' if point else 'before a save'}", at, step)

    assert sorted(errors) == ([1, 2] if how == "killed" else [0, 1, 2])
    for rank in (1, 2):
        assert_speaks_for_itself(errors[rank], rank)
    if how == "cut off":
        assert errors[0].type == "RanksMissingError"
        assert list(errors[0]["missing"]) == [1, 2]
    job.trains_on()
    assert committed(job.root) == [first]
    assert_closes(job)


def test_a_cut_off_store_that_comes_back_serves_the_next_save(start):
    job = start(world=3, on=3)
    first = job.saved()
    at = job.cut_off(FIRST)
    job.faulted("the host of the store is cut off before a save", at, job.save())
    job.hosts.heal(FIRST)
    job.answered()
    later = job.saved()
    assert committed(job.root) == [first, later]


def test_when_the_process_of_the_store_stands_still_saves_fail_in_time_and_when_it_goes_on_they_are_committed(start):
    job = start(world=2)
    first = job.saved()
    job.store.signal(signal.SIGSTOP)
    errors = job.faulted("the process of the store is stopped", time.monotonic(), job.save())

    for rank, error in errors.items():
        assert_speaks_for_itself(error, rank)
    job.trains_on()
    job.store.signal(signal.SIGCONT)
    job.answered()
    later = job.saved()
    assert committed(job.root) == [first, later]
    assert [closed["raised"] for closed in job.close()] == [None, None]


def test_when_the_process_of_the_store_dies_every_rank_fails_at_once_closes_and_the_next_job_resumes(start):
    job = start(world=2)
    first = job.saved()
    job.store.kill()
    errors = job.faulted("the process of the store is killed", time.monotonic(), job.save())

    for rank, error in errors.items():
        assert_speaks_for_itself(error, rank)
    job.trains_on()
    assert committed(job.root) == [first]
    assert_closes(job)
    job.end()
    again = start(world=2, on=[0, 1], beside=job)
    assert [began["resumed"] for began in again.began] == [first, first]
