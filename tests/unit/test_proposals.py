"""Saves that no schedule names: every rank does the same at the same step, and no rank waits for another in a step."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from dcpsvc.ranks.c10d import SoloStore
from dcpsvc.ranks.proposals import SAVE, STOP, Proposals
from dcpsvc.ranks.rendezvous import Rendezvous
from tests.unit.watchers import BOUND_S, WORLD, Job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def once() -> Callable[[], bool]:
    """Due at the first poll, and never again."""
    answers: Iterator[bool] = iter([True])
    return lambda: next(answers, False)


def test_without_a_proposal_nothing_is_done_at_any_step() -> None:
    with Job() as job:
        assert all(job.at(step) == [None] * WORLD for step in range(1, 50))


def test_nothing_is_proposed_before_the_first_step() -> None:
    asked: list[bool] = []
    with Job(lambda: bool(asked.append(True))) as job:
        job.ranks[1].ask_to_stop()
        job.store.looked(4 * WORLD)
    assert not asked
    assert job.store.get("run/proposals/0/what") is None


def test_a_due_save_is_made_by_every_rank_at_one_step() -> None:
    with Job(once()) as job:
        assert job.at(5) == [None] * WORLD
        assert job.verdict(0) == "go"
        told = {step: job.at(step) for step in range(6, 40)}
    assert [words for words in told.values() if any(words)] == [[SAVE] * WORLD]


def test_a_proposal_lies_ahead_of_the_step_it_was_made_in() -> None:
    with Job(once()) as job:
        job.at(5)
        step = job.proposed(0)
        assert step > 6
        job.verdict(0)
        assert job.at(step - 1) == [None] * WORLD
        assert job.at(step) == [SAVE] * WORLD


def test_any_rank_can_stop_the_job_and_all_stop_at_one_step() -> None:
    for asking in range(WORLD):
        with Job() as job:
            job.at(1)
            job.ranks[asking].ask_to_stop()
            assert job.verdict(0) == "go"
            told = {step: job.at(step) for step in range(2, 40)}
        assert [words for words in told.values() if any(words)] == [[STOP] * WORLD]


def test_the_job_is_stopped_once() -> None:
    with Job(lambda: True) as job:
        job.ranks[2].ask_to_stop()
        job.at(1)
        job.verdict(0)
        told = [words for step in range(2, 40) if any(words := job.at(step))]
        job.store.looked(4 * WORLD)
    assert told == [[STOP] * WORLD]
    assert job.store.get("run/proposals/1/what") is None


def test_a_rank_that_is_past_the_proposed_step_voids_it_for_all() -> None:
    with Job(once()) as job:
        job.ranks[2].at(1000)
        job.ranks[1].at(5)
        job.ranks[0].at(5)
        assert job.noted(0) == ["noted", "noted", "late"]
        assert job.verdict(0) == "void"
        told = [rank.at(step) for step in range(6, 20) for rank in job.ranks[:2]]
    assert not any(told)


def test_a_rank_that_reaches_the_step_before_all_have_noted_voids_it_for_all() -> None:
    job = Job(once())
    fast, slow = job.ranks[0], job.ranks[2]
    try:
        for rank in (fast, job.ranks[1]):
            rank.start()
        fast.at(5)
        job.store.until("run/proposals/0/seen/0")
        job.store.until("run/proposals/0/seen/1")
        step = job.proposed(0)
        assert [fast.at(step - 1), fast.at(step)] == [None, None]
        slow.start()
        assert [rank.at(at) for at in (step - 1, step, step + 1) for rank in job.ranks[1:]] == [None] * 6
        assert job.verdict(0) == "void"
    finally:
        job.__exit__()


def test_after_a_void_proposal_another_is_made() -> None:
    with Job(lambda: True) as job:
        job.ranks[2].at(1000)
        for rank in job.ranks[:2]:
            rank.at(5)
        assert job.verdict(0) == "void"
        job.at(job.proposed(0))
        assert job.proposed(1) > job.proposed(0)


def test_a_watcher_outlives_a_store_that_fails_for_a_while() -> None:
    failed = threading.Semaphore(0)

    class Shaky(SoloStore):
        def get(self, key: str) -> str | None:
            failed.release()
            raise RuntimeError("connection reset by peer")

    watcher = Proposals(Rendezvous(0, 1, Shaky(), namespace="run"), lambda: True)
    watcher.start()
    assert all(failed.acquire(timeout=BOUND_S) for _ in range(3))
    watcher.stop()
    assert not watcher._thread.is_alive()
