"""R18: saves that no schedule names are made by all ranks or by none, however the watchers are timed."""

import pytest

from dcpsvc.deadline import SystemClock
from dcpsvc.ranks.c10d import SoloStore
from dcpsvc.ranks.proposals import QUIT, SAVE, STOP, Proposals
from dcpsvc.ranks.rendezvous import Rendezvous


class SlowSteps(SystemClock):
    """A clock by which any two steps are ten seconds apart."""

    def __init__(self):
        self.seconds = 0.0

    def now(self):
        self.seconds += 10.0
        return self.seconds

    def sleep(self, seconds):
        raise AssertionError("nothing here waits")


def two_ranks(*, due=True):
    """A job for which a save is always due."""
    store = SoloStore()
    ranks = [Rendezvous(rank, 2, store, clock=SlowSteps(), namespace="job") for rank in range(2)]
    return [Proposals(rank, lambda: due) for rank in ranks]


def agree_on_a_save(coordinator, other, step):
    """All watchers run until a save at ``step + 1`` is agreed."""
    assert [rank.at(step) for rank in (coordinator, other)] == [None, None]
    coordinator.look()  # proposes
    other.look()  # notes it
    coordinator.look()  # says go


@pytest.mark.parametrize("more_looks", range(5))
def test_long_steps_do_not_let_a_second_proposal_replace_the_first(more_looks):
    coordinator, other = two_ranks()
    agree_on_a_save(coordinator, other, 10)

    for _ in range(more_looks):  # the step takes its time, and a save is still due
        coordinator.look()

    decided = [rank.at(11) for rank in (coordinator, other)]
    assert decided == [SAVE, SAVE]


@pytest.mark.parametrize("end", [STOP, QUIT])
@pytest.mark.parametrize("visited", [11, 20])
def test_an_end_is_not_lost_beside_a_save_and_costs_no_step(visited, end):
    coordinator, other = two_ranks()
    agree_on_a_save(coordinator, other, 10)
    other.ask(end)
    for _ in range(3):
        other.look()
        coordinator.look()

    assert [rank.at(visited) for rank in (coordinator, other)] == [STOP, STOP]


@pytest.mark.parametrize("kind", [SAVE, STOP, QUIT])
def test_what_comes_too_late_for_a_step_is_done_at_the_next(kind):
    coordinator, other = two_ranks(due=False)
    for rank in (coordinator, other):
        rank.at(10)
    other.ask(kind)
    other.look()
    coordinator.look()  # proposes step 11
    assert [rank.at(11) for rank in (coordinator, other)] == [None, None]
    for _ in range(2):
        coordinator.look()
        other.look()
    coordinator.look()
    assert [rank.at(12) for rank in (coordinator, other)] == [kind, kind]
