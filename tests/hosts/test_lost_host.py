"""A host that loses its power: the others are told who is gone, and a smaller job goes on from the newest commit."""

import pytest

from dcpsvc import Point
from tests.hosts.cluster import DEADLINE_S, SLACK_S, SYNC_S
from tests.hosts.trainer import ALL_GATHER
from tests.ranks.models import committed

NEAR, FAR = 0, 1


@pytest.mark.parametrize("point", [Point.STAGED, ALL_GATHER, Point.ACKED_LOCAL, Point.ACKED_REMOTE])
def test_when_a_host_is_killed_the_others_are_told_and_a_job_on_them_alone_resumes_the_newest_commit(start, point):
    job = start(world=4)
    first = job.saved()
    lost = job.on(FAR)
    job.hold(lost, point)
    step = job.save()
    job.held(lost, point)
    deadline_s = 2 * DEADLINE_S if point == ALL_GATHER else DEADLINE_S
    errors = job.faulted(f"a host is killed at {point}", job.kill(FAR), step, deadline_s)

    assert sorted(errors) == [0, 1]
    for error in errors.values():
        if point == Point.ACKED_REMOTE:
            assert error.type == "CommitUnknownError"
            assert "ranks (2, 3)" in error["reason"]
        else:
            assert error.type == "RanksMissingError"
            assert list(error["missing"]) == [rank.rank for rank in lost]
    job.trains_on()
    assert committed(job.root) == [first]
    for closed in job.close():
        assert "SaveError" in closed["raised"].family
        assert closed["seconds"] < 2 * SYNC_S + SLACK_S
    job.end()

    newest = step if point == Point.ACKED_REMOTE else first  # every shard was there: the new job finishes that one
    smaller = start(world=2, on=[NEAR], beside=job)
    assert [(began["resumed"], began["weights"]) for began in smaller.began] == [(newest, {float(newest)})] * 2
    assert smaller.saved() in committed(job.root)
    assert [(closed["raised"], closed["threads"]) for closed in smaller.close()] == [(None, [])] * 2
