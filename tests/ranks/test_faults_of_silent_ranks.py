"""L1-L7: a rank stops or dies, also inside a meeting or a collective; the others hear the same in time, by name."""

import functools
import signal
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import dcpsvc
from dcpsvc import Point
from tests.ranks.faults import own_threads, record, stop_self
from tests.ranks.harness import Job, die, raised_by, run_jobs, run_ranks, values
from tests.ranks.lives import MISSING, ROLES, SLACK_S, UNKNOWN, Life, assert_the_laws_hold, content, side_by_side
from tests.ranks.models import Training, checkpointer
from tests.ranks.rounds import SYNC_S, Counters, Fault, Rounds, live_through, victim_of

COLLECTIVE_S = 2 * SYNC_S
"""Until a collective gives up, and then until the rank that does not come is known to be silent."""

# --- a rank that hangs, whole, and comes back ------------------------------------------------------------


def stopped(at, hears, **more):
    return Fault(at=at, does=lambda _: stop_self(), stops=True, hears=hears, **more)


def named(*faults):
    return {f"stopped at: {fault.at}": fault for fault in faults}


BOTH = named(
    stopped(f"point {Point.SAVE_ACCEPTED}", MISSING),
    stopped("before plan", MISSING),
    stopped("inside plan", MISSING),
    stopped("gather plan", MISSING, regroups=True, deadline_s=COLLECTIVE_S),
    stopped("before local", MISSING),
    stopped("inside local", MISSING, deadline_s=COLLECTIVE_S),
    stopped("gather local", MISSING, deadline_s=COLLECTIVE_S),
    stopped("put_file data", MISSING),
    stopped("before remote", MISSING),
    stopped("inside remote", MISSING, deadline_s=COLLECTIVE_S),
    stopped("gather remote", MISSING, deadline_s=COLLECTIVE_S),
    stopped("before commit", UNKNOWN),
    stopped(f"point {Point.COMMITTED}", ()),
    stopped("before retain", ()),
    stopped("inside retain", ()),
)
STOPS = {
    "coordinator": BOTH | named(
        stopped("inside commit", UNKNOWN),
        stopped("create manifests", UNKNOWN),
        stopped("done create manifests", UNKNOWN),
    ),
    "other": BOTH | named(stopped("inside commit", ())),
}  # fmt: skip


def live(rank, world, place, role, names):
    return live_through(rank, world, place, role, {name: STOPS[role][name] for name in names})


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    lives = [life for role in ROLES for life in Life(role=role, faults=STOPS[role], world=3).in_parts(3)]
    return side_by_side(live, lives, tmp_path_factory.mktemp("lived"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("role", "name"), [(role, name) for role in ROLES for name in STOPS[role]])
def test_a_rank_that_stops_is_named_alike_to_all_in_time_and_costs_one_save_at_most(lived, role, name):
    assert_the_laws_hold(lived.case(role, name))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("place", ["gather plan", "gather local", "gather remote"])
def test_a_group_in_which_a_rank_stalled_is_replaced_and_the_next_save_is_committed(lived, role, place):
    for found in lived.case(role, f"stopped at: {place}").seen:
        before, after = found.generation
        assert after == before + 1
        assert found.afterwards is None


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_after_all_that_the_ranks_close_in_peace_and_no_thread_is_left(lived):
    assert all(end == (None, []) for end in lived.ends()), lived.ends()


# --- a rank that dies inside a meeting or a collective -----------------------------------------------------

DEADLY = (
    "inside plan", "gather plan", "inside local", "gather local", "inside remote", "gather remote", "inside commit",
    "inside retain",
)  # fmt: skip
AT_ONCE = 4
"""Jobs side by side."""
TRIES = 3
"""A busy machine may cost a job a save before its rank dies."""
STEP = 4


def die_there(rank, world, place, victim, where):
    """Save with a death, save without that rank, close."""
    rounds = Rounds(rank, world, place, victim)
    rounds.training.state["extra"] = dcpsvc.PerRank(torch.zeros(5))  # so that the layout is gathered
    if rank == victim:
        rounds.trap.set(where, lambda: note_and_die(place))
    errors = [rounds.attempt(STEP)]
    heard = time.monotonic()
    errors.append(rounds.attempt(STEP + 1))
    closing = raised_by(rounds.ckpt.close)
    return {"errors": errors, "heard": heard, "closing": closing, "threads": own_threads()}


def note_and_die(place):
    (place / "died").write_text(str(time.monotonic()))
    die()


def resume_all(rank, world, places):
    """One process on the first rank's disk, and what it finds there."""
    return [resume_at(place) for place in places]


def resume_at(place):
    training = Training("plain", 0)
    training.state |= {"counters": Counters(), "extra": dcpsvc.PerRank(torch.zeros(5))}
    with checkpointer(place / "run", training.state, local=place / "node-0", save_last=False) as ckpt:
        error = raised_by(ckpt.resume, skip=["extra", "loader", "rng"])
        return error, ckpt.statistics().resumed_from


@dataclass(frozen=True)
class Death:
    """A job in which a rank died: who, how the ranks ended, what lay there then, what a restart found."""

    world: int
    victim: int
    seconds: float
    outcomes: list[Any]
    manifests: set[int]
    restart: Any


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    cases = [(where, role) for where in DEADLY for role in ROLES]
    batches = [cases[begin : begin + AT_ONCE] for begin in range(0, len(cases), AT_ONCE)]

    @functools.cache
    def batch(number):
        return dict(zip(batches[number], deaths(batches[number], tmp_path_factory.mktemp("dead")), strict=True))

    return lambda where, role: batch(cases.index((where, role)) // AT_ONCE)[where, role]


def deaths(cases, folder):
    worlds = [2 + number % 3 for number in range(len(cases))]
    victims = [victim_of(role, world) for (_, role), world in zip(cases, worlds, strict=True)]
    jobs = list(zip(worlds, victims, [where for where, _ in cases], strict=True))
    places, ended = [folder] * len(jobs), [[] for _ in jobs]
    for number in range(TRIES):
        again = [at for at, place in enumerate(places) if not (place / "died").exists()]
        for at in again:
            places[at] = folder / f"{at}-{number}"
            places[at].mkdir()
        new = run_jobs([run_of(*jobs[at], places[at]) for at in again], timeout_s=150.0) if again else []
        for at, outcomes in zip(again, new, strict=True):
            ended[at] = outcomes
    manifests = [manifests_at(place) for place in places]
    (restarts,) = values(run_ranks(0, resume_all, places))
    seconds = [seconds_from_death(*both) for both in zip(places, ended, strict=True)]
    return [Death(*row) for row in zip(worlds, victims, seconds, ended, manifests, restarts, strict=True)]


def run_of(world, victim, where, place):
    return Job(world, die_there, (place, victim, where))


def manifests_at(place):
    return {int(path.name.partition(".step-")[2][:12]) for path in (place / "run/manifests").glob("order-*")}


def seconds_from_death(place, outcomes):
    heard = [outcome.value["heard"] for outcome in outcomes if outcome.returned]
    return max(heard) - float((place / "died").read_text())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("where", DEADLY)
def test_a_rank_that_dies_is_named_alike_to_the_others_in_time_and_the_job_ends_in_peace(dead, where, role):
    death = dead(where, role)
    row = {"fault": f"killed {where}", "role": role, "world": death.world, "result": "fail"}
    try:
        row |= assert_all_hear_of(death)
        assert row["error"] in expected(where, role)
        row["result"] = "pass"
    finally:
        record("DCPSVC_FAULT_TABLE", **row)


def expected(where, role):
    if where == "inside retain" or (where == "inside commit" and role == "other"):
        return ("committed",)
    return UNKNOWN if where == "inside commit" else MISSING


def assert_all_hear_of(death):
    assert death.outcomes[death.victim].signal == signal.SIGKILL
    results = values([outcome for outcome in death.outcomes if outcome.rank != death.victim])
    first, second = zip(*(result["errors"] for result in results), strict=True)
    assert len({repr(content(error)) for error in first}) == len({repr(content(error)) for error in second}) == 1
    if first[0] and first[0].type in MISSING:
        assert list(first[0]["missing"]) == [death.victim]
    assert second[0].type in MISSING
    assert list(second[0]["missing"]) == [death.victim]
    assert all("SaveError" in result["closing"].family for result in results)
    assert [result["threads"] for result in results] == [[]] * len(results)
    assert death.seconds < COLLECTIVE_S + SLACK_S
    assert STEP - 1 in death.manifests
    error, resumed = death.restart
    assert error is None
    assert resumed in {max(death.manifests), STEP}  # what was all there is committed by the restart
    kind = first[0].type if first[0] else "committed"
    return {"error": kind, "seconds": round(max(death.seconds, 0.0), 2), "deadline_s": COLLECTIVE_S}
