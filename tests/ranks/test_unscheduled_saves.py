"""R18: saves that no schedule names are made by all ranks or by none, however the watchers are timed."""

import pytest

from dcpsvc.ranks.c10d import SoloStore
from dcpsvc.ranks.proposals import Proposals
from dcpsvc.ranks.rendezvous import Rendezvous


def two_ranks(due=lambda: True):
    store = SoloStore()
    return [Proposals(Rendezvous(rank, 2, store, namespace="job"), due) for rank in range(2)]


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
    for step in (visited, visited + 10, visited + 20, visited + 30):
        decided.append([rank.at(step) for rank in (coordinator, other)])
        for _ in range(3):
            coordinator.look()
            other.look()

    assert all(mine == theirs for mine, theirs in decided)
    assert ["stop", "stop"] in decided
