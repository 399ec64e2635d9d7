"""However a job counts, and however its watchers are timed: what was asked for is done, once, by all."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc import Checkpointer
from dcpsvc.ranks.proposals import QUIT, SAVE, STOP
from tests.unit.watchers import WORLD, Job, Watched

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("stride", [1, 2, 3, 7, 10, 37, 1000])
@pytest.mark.parametrize("asking", range(WORLD))
def test_a_job_that_counts_in_strides_stops_once_at_one_step_of_all(stride: int, asking: int) -> None:
    job = Job()
    job.ranks[asking].ask(STOP)
    assert [kind for _, kind in job.done(range(0, 400 * stride, stride))] == [STOP]


@given(st.lists(st.integers(1, 50), min_size=200, max_size=200), st.integers(0, 100))
def test_whatever_the_strides_a_job_stops_once_at_one_step_of_all(strides: list[int], before: int) -> None:
    job, steps = Job(), [0]
    for stride in strides:
        steps.append(steps[-1] + stride)
    assert job.done(steps[:before]) == []
    job.ranks[1].ask(STOP)
    assert [kind for _, kind in job.done(steps[before:])] == [STOP]


@pytest.mark.parametrize("stride", [1, 10, 37])
def test_a_due_save_is_made_again_and_again_by_all_ranks_at_the_same_steps(stride: int) -> None:
    job = Job(lambda: True)
    done = job.done(range(0, 200 * stride, stride))
    assert {kind for _, kind in done} == {SAVE}
    assert len(done) > 3


@pytest.mark.parametrize("first", [0, 1, 100_001, 10**11])
def test_the_first_step_of_a_resumed_job_is_not_taken_for_its_speed(first: int) -> None:
    job = Job()
    job.look(10)
    job.at(first)
    job.ranks[0].ask(STOP)
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


# --- any order of everything ------------------------------------------------------------------------


class Moody(Watched):
    """Fails at chosen calls of the watchers, before or after it did what it was asked."""

    def __init__(self, moods: list[int]) -> None:
        super().__init__()
        self.moods, self.watching = moods, False

    def set(self, key: str, value: str) -> None:
        self._mind(lambda: super(Moody, self).set(key, value))

    def get(self, key: str) -> str | None:
        return self._mind(lambda: super(Moody, self).get(key))

    def compare_set(self, key: str, desired: str) -> str:
        return self._mind(lambda: super(Moody, self).compare_set(key, desired))

    def _mind(self, call):
        mood = self.moods.pop() if self.watching and self.moods else 0
        if mood == 1:
            raise RuntimeError("connection refused")
        answer = call()
        if mood == 2:
            raise RuntimeError("connection reset")
        return answer


class Anyhow:
    """A job whose ranks step, look and ask in any order.

    Attributes:
        done: What each rank did at which step.
        owed: What each rank asked for and has not seen done.
    """

    def __init__(self, moods: list[int], stride: int, step_s: float) -> None:
        self.store, self.stride = Moody(moods), stride
        self.job = Job(step_s=step_s, store=self.store)
        self.at = [0] * WORLD
        self.done: list[dict[int, str]] = [{} for _ in range(WORLD)]
        self.owed: list[set[str]] = [set() for _ in range(WORLD)]

    def ended(self, n: int) -> bool:
        return not {STOP, QUIT}.isdisjoint(self.done[n].values())

    def step(self, n: int) -> None:
        self.at[n] += self.stride
        if (kind := self.job.ranks[n].at(self.at[n])) is not None:
            self.done[n][self.at[n]] = kind
            self.owed[n] -= {SAVE: {SAVE}, STOP: {SAVE, STOP, QUIT}, QUIT: {SAVE, STOP, QUIT}}[kind]

    def look(self, n: int) -> None:
        self.store.watching = True
        with contextlib.suppress(RuntimeError):
            self.job.ranks[n].look()
        self.store.watching = False

    def ask(self, n: int, kind: str) -> None:
        self.job.ranks[n].ask(kind)
        self.owed[n].add(kind)

    def go_on(self, steps: int) -> None:
        """In step, on a store that works again, until everything asked for must be done."""
        self.store.moods.clear()
        for _ in range(steps):
            for n in range(WORLD):
                if not self.ended(n) and self.at[n] <= min(self.at):
                    self.step(n)
            for n in range(WORLD):
                self.look(n)


ranks = st.integers(0, WORLD - 1)
kinds = st.sampled_from([SAVE, SAVE, SAVE, STOP, QUIT])
events = st.one_of(
    st.tuples(st.just(Anyhow.look), ranks),
    st.tuples(st.just(Anyhow.look), ranks),
    st.tuples(st.just(Anyhow.step), ranks),
    st.tuples(st.just(Anyhow.ask), ranks, kinds),
)
moods = st.lists(st.sampled_from([0, 0, 0, 1, 2]), max_size=60)


@given(st.lists(events, max_size=120), moods, st.integers(1, 12), st.sampled_from([0.01, 0.2, 5.0]))
def test_in_any_order_all_ranks_do_the_same_and_nothing_asked_for_is_lost(order, moods, stride, step_s) -> None:
    everybody = Anyhow(moods, stride, step_s)
    for event, n, *kind in order:
        if not everybody.ended(n):
            event(everybody, n, *kind)
    everybody.go_on(400)

    first, *others = everybody.done
    assert others == [first] * (WORLD - 1)
    assert not any(everybody.owed)
    asked = {kind[0] for _, _, *kind in order if kind}
    assert len([kind for kind in first.values() if kind != SAVE]) == (not asked <= {SAVE})
    for step in everybody.job.agreed(SAVE):
        assert any(kind == STOP or (kind == SAVE and at >= step) for at, kind in first.items())
