"""The protocol under a few thousand seeded schedules of faults; `make simulate` plays as many as wished."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.model.planted import BUGS, BUGS_OF_TWO_JOBS, planted
from tests.model.simulate import play_many
from tests.model.states import Distinct
from tests.model.world import Report, World, play, silence

if TYPE_CHECKING:
    from collections.abc import Iterator

SEEDS, PARTS = 2000, 8
MOST_SEEDS_TO_FIND, MOST_SEEDS_TO_FIND_WITH_A_PLOT = 600, 8000


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with silence():
        yield


@pytest.mark.slow
@pytest.mark.timeout(240)  # about 4 s on a core of its own
@pytest.mark.parametrize("part", range(PARTS))
def test_every_invariant_holds_after_every_event_of_every_schedule(part: int) -> None:
    share = SEEDS // PARTS
    found = play_many(range(part * share, (part + 1) * share))
    assert found.failures == []
    assert found.outcomes["rank heard: committed"] > share  # it was no storm in which nothing happens


def test_a_seed_plays_the_same_history_again_and_another_seed_another_one() -> None:
    first, again = ([play(seed).fingerprint for seed in range(30)] for _ in range(2))
    assert first == again
    assert len(set(first)) == len(first)


@pytest.mark.slow
def test_a_history_does_not_depend_on_the_process_that_plays_it() -> None:
    assert _played_elsewhere(hash_seed="1") == _played_elsewhere(hash_seed="2")


def test_tracing_changes_nothing() -> None:
    traced = play(3, tracing=True)
    assert traced.fingerprint == play(3).fingerprint
    assert traced.trace


@pytest.mark.timeout(240)
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs(bug: str) -> None:
    """The test of the test: each bug, planted in production code on purpose, is found within some hundred seeds."""
    with planted(bug):
        found = _first_failure()
    assert found is not None, f"{bug}: not found within {MOST_SEEDS_TO_FIND} seeds"
    print(f"{bug}: seed {found.seed}: {found.error}")
    assert not play(found.seed).error  # it was the bug, not the seed


@pytest.mark.slow
@pytest.mark.timeout(400)  # the one that hides best takes 10 s on a core of its own
@pytest.mark.parametrize("bug", BUGS_OF_TWO_JOBS)
def test_planted_bugs_of_two_jobs(bug: str) -> None:
    with planted(bug):
        found = _first_failure_of_a_plot()
    assert found is not None, f"{bug}: not found within {MOST_SEEDS_TO_FIND_WITH_A_PLOT} seeds"
    print(f"{bug}: seed {found.seed}: {found.error}")
    assert not play(found.seed).error


def _first_failure() -> Report | None:
    reports = (play(seed) for seed in range(MOST_SEEDS_TO_FIND))
    return next((report for report in reports if report.error), None)


def _first_failure_of_a_plot() -> Report | None:
    worlds = (World(seed, Distinct()) for seed in range(MOST_SEEDS_TO_FIND_WITH_A_PLOT))
    reports = (world.run() for world in worlds if world.settings.ambush)
    return next((report for report in reports if report.error), None)


def _played_elsewhere(*, hash_seed: str) -> str:
    here = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.model.simulate", "--seed", "7"]
    done = subprocess.run(
        command, cwd=here, env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
    )
    return done.stdout
