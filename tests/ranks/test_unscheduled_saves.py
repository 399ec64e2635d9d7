"""R18: saves that no schedule names are made by all ranks or by none, however the watchers are timed."""

import pytest

from dcpsvc.ranks.c10d import SoloStore
from dcpsvc.ranks.proposals import Proposals
from dcpsvc.ranks.rendezvous import Rendezvous


class SlowSteps:
    """A clock by which any two looks are a second apart."""

    def __init__(self):
        self.seconds = 0.0

    def now(self):
        self.seconds += 1.0
        return self.seconds

    def sleep(self, seconds):
        raise AssertionError("nothing here waits")


def two_ranks():
    """A job for which a save is always due."""
    store = SoloStore()
    ranks = [Rendezvous(rank, 2, store, clock=SlowSteps(), namespace="job") for rank in range(2)]
    return [Proposals(rank, lambda: True) for rank in ranks]


def agree_on_a_save(coordinator, other, step):
    """All watchers run until a save at ``step + 2`` is agreed."""
    assert [rank.at(step) for rank in (coordinator, other)] == [None, None]
    coordinator.look()  # proposes
    coordinator.look()  # notes it
    other.look()  # notes it
    coordinator.look()  # says go


@pytest.mark.parametrize("more_looks", range(5))
def test_long_steps_do_not_let_a_second_proposal_replace_the_first(more_looks):
    coordinator, other = two_ranks()
    agree_on_a_save(coordinator, other, 10)

    for _ in range(more_looks):  # the step takes its time, and a save is still due
        coordinator.look()

    decided = [rank.at(12) for rank in (coordinator, other)]
    assert decided == ["save", "save"]


@pytest.mark.parametrize("visited", [12, 20])
def test_a_stop_is_not_lost_beside_a_save(visited):
    coordinator, other = two_ranks()
    agree_on_a_save(coordinator, other, 10)
    other.ask_to_stop()
    for _ in range(3):
        coordinator.look()
        other.look()

    decided = []
    for step in range(visited, visited + 100, 10):
        decided.append([rank.at(step) for rank in (coordinator, other)])
        for _ in range(3):
            coordinator.look()
            other.look()

    assert all(mine == theirs for mine, theirs in decided)
    assert ["stop", "stop"] in decided
