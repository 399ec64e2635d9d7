"""A job may count its steps by tens or begin at a large number: what was agreed on is still done, once, by all."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc import Checkpointer
from dcpsvc.ranks.c10d import SoloStore
from dcpsvc.ranks.proposals import SAVE, STOP, Proposals
from dcpsvc.ranks.rendezvous import Rendezvous
from tests.unit.watchers import WORLD, Clock

if TYPE_CHECKING:
    from pathlib import Path


class Job:
    """All ranks on one store; they look when they are told to."""

    def __init__(self, *, due: bool = False) -> None:
        self.store = SoloStore()
        self.ranks = [Proposals(Rendezvous(n, WORLD, self.store, Clock(), "run"), lambda: due) for n in range(WORLD)]

    def at(self, step: int) -> list[str | None]:
        return [rank.at(step) for rank in self.ranks]

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            for rank in (*self.ranks[1:], self.ranks[0]):
                rank.look()

    def proposed(self, number: int) -> int:
        return json.loads(self.store.get(f"run/proposals/{number}/what") or "{}")["step"]


def stopped_at(job: Job, steps: list[int]) -> list[int]:
    """The steps at which every rank is told to stop; no step at which only some are."""
    found = []
    for step in steps:
        told = job.at(step)
        assert told in ([None] * WORLD, [STOP] * WORLD)
        found += [step] if told[0] else []
        job.look()
    return found


@pytest.mark.parametrize("stride", [1, 2, 3, 7, 10, 37, 1000])
@pytest.mark.parametrize("asking", range(WORLD))
def test_a_job_that_counts_in_strides_stops_once_at_one_step_of_all(stride: int, asking: int) -> None:
    job = Job()
    job.ranks[asking].ask_to_stop()
    assert len(stopped_at(job, list(range(0, 400 * stride, stride)))) == 1


@given(st.lists(st.integers(1, 50), min_size=200, max_size=200))
def test_whatever_the_strides_a_job_stops_once_at_one_step_of_all(strides: list[int]) -> None:
    job, steps = Job(), [0]
    for stride in strides:
        steps.append(steps[-1] + stride)
    job.ranks[1].ask_to_stop()
    (stop,) = stopped_at(job, steps)
    assert stop in steps


@pytest.mark.parametrize("stride", [1, 10, 37])
def test_a_due_save_is_made_again_and_again_by_all_ranks_at_the_same_steps(stride: int) -> None:
    job, saved = Job(due=True), 0
    for step in range(0, 200 * stride, stride):
        told = job.at(step)
        assert told in ([None] * WORLD, [SAVE] * WORLD)
        saved += told[0] is not None
        job.look()
    assert saved > 3


@pytest.mark.parametrize("first", [0, 1, 100_001, 10**11])
def test_the_first_step_of_a_resumed_job_is_not_taken_for_its_speed(first: int) -> None:
    job = Job()
    job.look(10)
    job.at(first)
    job.ranks[0].ask_to_stop()
    job.look()
    assert first < job.proposed(0) < first + 100


@pytest.mark.parametrize("stride", [1, 10, 37])
def test_step_says_stop_after_request_stop_and_that_step_is_saved(tmp_path: Path, stride: int) -> None:
    with Checkpointer(tmp_path / "root", {"x": [1]}, local=tmp_path / "local", save_last=False) as ckpt:
        ckpt.request_stop()
        for step in range(stride, 10**9, stride):  # the test's own timeout bounds it
            outcome = ckpt.step(step)
            if outcome.should_stop:
                break
        assert outcome.pending is not None
        outcome.pending.wait(30)
        assert outcome.pending.step == step
