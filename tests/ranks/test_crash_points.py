"""R6 R14 R19: killed at every labelled point of a checkpoint's life; a restart goes on from there to the last bit."""

import contextlib
import functools
import os
import re
import resource
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import dcpsvc
from dcpsvc import Latest, Point
from tests.ranks.faults import Crew, FaultyStore, PeerDiedError, Trap, debris, empty_folders, record, unfinished
from tests.ranks.harness import Job, die, raised_by, run_jobs, run_ranks, values
from tests.ranks.models import SYNC_S, Training, checkpointer, committed

IMPATIENT_S = 3.0
UPLOAD_S = 20.0
SLACK_S = 5.0
BOUND_S = 40.0
STEPS = 9
CARRIED = 3
"""Its upload is cut short by the end of the first job, and finished by the next."""
FAILED, STEP, HELD, SKIPPED = 4, 5, 6, 7
"""Of the second job: one that fails on all ranks, the one that is looked at, two of which the second comes too soon."""

SIDE_BY_SIDE = 5

ROLES = ("coordinator", "middle", "last", "all")
COMBINATIONS = ((2, "ddp"), (3, "fsdp"), (4, "plain"), (3, "plain"), (2, "fsdp"), (4, "fsdp"))
"""DDP sorts its buckets anew after the first step, so that only two ranks add up the same after a restart."""

ONLY_ON_THE_COORDINATOR = {Point.MANIFEST_CREATED: "rank 0 alone writes the manifest"}
UNREACHABLE = {Point.TRAINING_WAITED: "another thread comes to it, wherever the save is by then"}
"""Points that are not killed at, and why. A point that is in neither is killed at, on every rank."""


# --- three jobs on one disk ---------------------------------------------------------------------------


class Counters:
    """A part of the state that can refuse to be saved."""

    refuses = False

    def state_dict(self):
        if self.refuses:
            raise LookupError("no count today")
        return {"count": 7}

    def load_state_dict(self, state):
        del state


class Witness:
    """Writes down what a rank was told, so that it outlives the rank; then the rank may die of it."""

    def __init__(self, folder, rank):
        self._path, self.kill, self.point, self.step = Path(folder) / f"rank-{rank}", None, "", None

    def arm(self, point, step, kill):
        self.point, self.step, self.kill = point, step, kill

    def __call__(self, event):
        struck = self.kill is not None and event.name == self.point and self.step in {None, event.step}
        line = f"{event.name} {event.step} {time.monotonic()}{' x' if struck else ''}\n"
        with self._path.open("a") as file:
            file.write(line)
        if struck:
            self.kill()


def told(folder):
    """What the ranks were told, by rank: name and step of each event, in order."""
    return {
        int(path.name.removeprefix("rank-")): [tuple(line.split()[:2]) for line in path.read_text().splitlines()]
        for path in Path(folder).iterdir()
    }


def killed_at(folder):
    """When the first rank died."""
    lines = [line.split() for path in Path(folder).iterdir() for line in path.read_text().splitlines()]
    return min((float(line[2]) for line in lines if line[-1] == "x"), default=None)


def opened(place, training, witness=None, store=None, sync_timeout_s=SYNC_S):
    node = int(os.environ.get("GROUP_RANK", "0"))
    return checkpointer(
        place / "run",
        training.state,
        local=place / f"node-{node}",
        store=store,
        keep=Latest(2),
        save_last=False,
        sync_timeout_s=sync_timeout_s,
        upload_timeout_s=UPLOAD_S,
        backpressure="skip",
        on_event=witness,
    )


def made(kind, rank):
    """Ranks that share no gradients must see the same data."""
    training = Training(kind, 0 if kind == "plain" else rank)
    training.state["counters"] = Counters()
    return training


def train_without_interruption(rank, world, kind):
    training = made(kind, rank)
    losses = training.train(STEPS)
    return losses, training.fingerprint(), training.own()


def first_job(rank, world, kind, place):
    """Commits steps 1 and 2; all of it dies when step 3 is on every local disk."""
    crew = Crew(rank, world)
    training = made(kind, rank)
    witness = Witness(place / "first", rank)
    if rank == 0:
        witness.arm(Point.ACKED_LOCAL, CARRIED, crew.die_together)
    ckpt = opened(place, training, witness)
    for step in range(1, CARRIED + 1):
        training.step()
        crew.line(f"step {step}")
        ckpt.save(step).wait(BOUND_S)


@dataclass(frozen=True)
class Death:
    """When a rank of the second job dies.

    Attributes:
        point: At this event.
        step: Of this step; None: of any.
        place: Or at this place of the life of step 5; see :class:`Trap`.
        within: Or in the middle of the first write after ``point`` that is longer than so many bytes.
    """

    point: str = ""
    step: int | None = None
    place: str = ""
    within: int = 0


def second_job(rank, world, kind, place, victim, death):  # noqa: PLR0917
    """A whole life, from the finished upload of another job to the end. Somebody may die in it."""
    crew = Crew(rank, world)
    training = made(kind, rank)
    witness, trap = Witness(place / "second", rank), Trap()
    if victim in {rank, "all"}:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        kill = crew.die_together if victim == "all" else die
        witness.arm(death.point, death.step, functools.partial(limit_files, death.within) if death.within else kill)
    store = FaultyStore(place / "run", trap)
    crew.line("begin")
    ckpt = opened(place, training, witness, store, IMPATIENT_S)
    try:
        return live(crew, training, ckpt, store, trap, death.place if rank == victim else "")
    except PeerDiedError as err:
        return {"peer died": str(err), "heard at": time.monotonic()}


def limit_files(nbytes):
    """From here on the kernel ends this process in the middle of a longer file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


def live(crew, training, ckpt, store, trap, place):  # noqa: PLR0917
    crew.line("open")
    if error := raised_by(ckpt.resume):
        return heard("resume", error)
    for step in (FAILED, STEP):
        crew.line(f"before {step}")
        training.step()
        training.state["counters"].refuses = step == FAILED and crew.rank == crew.world - 1
        crew.line(f"trained {step}")
        if step == STEP:
            trap.passed_by.clear()
            trap.set(place, die)
        error = raised_by(lambda n=step: ckpt.save(n).wait(BOUND_S))
        if error and step != FAILED:
            return heard(step, error)
        ckpt.wait(BOUND_S)
    places = list(trap.passed_by)
    crew.line("crowd")
    training.train(HELD - STEP)
    let_go = hold(store, "put_file data")
    first = ckpt.save(HELD)
    training.train(SKIPPED - HELD)
    second = ckpt.save(SKIPPED)
    let_go()
    errors = [raised_by(lambda p=pending: p.wait(BOUND_S)) for pending in (first, second)]
    if errors[0]:
        return heard(HELD, errors[0])
    crew.line("close")
    ckpt.close()
    crew.line("closed")
    return {"skipped": errors[1] and errors[1].type, "places": places}


def heard(where, error):
    return {"where": where, "error": error, "heard at": time.monotonic()}


def hold(store, place):
    """An operation of the store waits until the returned function is called."""
    gate = threading.Event()

    def wait(real, key, *args):
        gate.wait(BOUND_S)
        return real(key, *args)

    store.faults[place] = wait
    return gate.set


def third_job(rank, world, kind, place):
    """Resumes, trains to the end, and leaves."""
    training = made(kind, rank)
    with opened(place, training) as ckpt:
        start = ckpt.resume()
        losses = []
        for step in range(start + 1, STEPS + 1):
            losses += training.train(1)
            if step >= STEPS - 1:
                ckpt.save(step).wait(BOUND_S)
                ckpt.wait(BOUND_S)
    return start, losses, training.fingerprint(), training.own()


# --- the places they live in ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Beginning:
    """A run whose first job is over, and what the whole training should come to."""

    place: Path
    reference: list


@pytest.fixture(scope="module")
def beginnings(tmp_path_factory):
    """By world size and kind of model."""
    folder = tmp_path_factory.mktemp("beginnings")

    @functools.cache
    def begun(world, kind):
        place = new_place(folder / f"{kind}-{world}")
        undisturbed, first = run_jobs([
            Job(world, train_without_interruption, (kind,)),
            Job(world, first_job, (kind, place), nodes(world)),
        ])  # fmt: skip
        assert [outcome.signal for outcome in first] == [signal.SIGKILL] * world, first[0].raised
        assert committed(place / "run") == [1, 2]
        return Beginning(place, values(undisturbed))

    return begun


def new_place(place):
    for name in ("first", "second"):
        (place / name).mkdir(parents=True)
    return place


def nodes(world):
    return 2 if world == 4 else 1


@pytest.fixture(scope="module")
def undisturbed(beginnings, tmp_path_factory):
    """A second job in which nobody dies: its place, and by rank the places it came by."""
    place = tmp_path_factory.mktemp("undisturbed") / "place"
    shutil.copytree(beginnings(2, "ddp").place, place)
    results = values(run_ranks(2, second_job, "ddp", place, None, Death()))
    assert [result["skipped"] for result in results] == ["SaveSkippedError"] * 2
    return place, [result["places"] for result in results]


@pytest.fixture(scope="module")
def survey(undisturbed):
    """What the ranks are told, by rank, when nobody dies."""
    return told(undisturbed[0] / "second")


def step_of(point, survey):
    """The step at which a point is killed at: the one that is looked at, where it has it."""
    steps = [step for name, step in survey[0] if name == point]
    return STEP if str(STEP) in steps else next((int(step) for step in steps if step != "None"), None)


def test_the_life_below_comes_to_every_labelled_point_on_every_rank(survey):
    seen = {rank: {name for name, _ in events} - set(UNREACHABLE) for rank, events in survey.items()}
    assert seen[0] == set(Point) - set(UNREACHABLE)
    assert seen[1] == seen[0] - set(ONLY_ON_THE_COORDINATOR)


# --- killed at a labelled point -------------------------------------------------------------------------


def combination(point, role):
    """World sizes and kinds of model, spread over the cases."""
    number = 3 * list(Point).index(point) + ROLES.index(role)
    found = COMBINATIONS[number % len(COMBINATIONS)]
    return COMBINATIONS[(number + 1) % len(COMBINATIONS)] if role == "middle" and found[0] == 2 else found


def victim_of(role, world):
    return {"coordinator": 0, "middle": world // 2, "last": world - 1, "all": "all"}[role]


@dataclass(frozen=True)
class Case:
    world: int
    kind: str
    place: Path
    victim: int | str
    outcomes: list
    committed_then: list
    restarted: list


def died_and_restarted(beginnings, folder, deaths):
    """Lives that end, side by side, each followed by a restart.

    Args:
        beginnings: The fixture.
        folder: For the places.
        deaths: Of each: world size, kind of model, who dies, and when.
    """
    places = [folder / str(number) for number in range(len(deaths))]
    for (world, kind, *_), place in zip(deaths, places, strict=True):
        shutil.copytree(beginnings(world, kind).place, place)
    died = run_jobs([
        Job(world, second_job, (kind, place, victim, death), nodes(world))
        for (world, kind, victim, death), place in zip(deaths, places, strict=True)
    ], timeout_s=90.0)  # fmt: skip
    then = [listed(place) for place in places]
    restarted = run_jobs([
        Job(world, third_job, (kind, place), nodes(world))
        for (world, kind, *_), place in zip(deaths, places, strict=True)
    ], timeout_s=90.0)  # fmt: skip
    return [
        Case(world, kind, place, victim, *ended)
        for (world, kind, victim, _), place, *ended in zip(deaths, places, died, then, restarted, strict=True)
    ]


@pytest.fixture(scope="module")
def cases(beginnings, survey, tmp_path_factory):
    """All roles that die at one point."""

    @functools.cache
    def lived(point):
        death = Death(str(point), step_of(point, survey))
        combinations = [combination(point, role) for role in ROLES]
        deaths = [
            (world, kind, victim_of(role, world), death)
            for role, (world, kind) in zip(ROLES, combinations, strict=True)
        ]
        found = died_and_restarted(beginnings, tmp_path_factory.mktemp(str(point)), deaths)
        return dict(zip(ROLES, found, strict=True))

    return lived


def listed(place):
    return [(found.step, found.state) for found in dcpsvc.list_checkpoints(place / "run")]


def reported(place):
    """Steps that some rank was told to be committed, before it died."""
    return {int(step) for events in told(place / "second").values() for name, step in events if name == "committed"}


def may_resume(point, survey):
    """Steps that a restart may go on from, after a death at a point."""
    order = [name for name, step in survey[0] if step == str(STEP)]
    if point == Point.SAVE_SKIPPED:
        return {STEP, HELD}
    if point == Point.CLOSED:
        return {HELD}
    return {STEP} if point in order and order.index(point) >= order.index(Point.ACKED_LOCAL) else {CARRIED}


@contextlib.contextmanager
def row(**about):
    """A line of the table, whatever comes of it."""
    found = about | {"result": "fail"}
    try:
        yield found
        found["result"] = "pass"
    finally:
        record("DCPSVC_CRASH_TABLE", **found)


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("point", [point for point in Point if point not in UNREACHABLE], ids=str)
def test_killed_at_a_point_the_job_loses_no_commit_and_goes_on_to_the_last_bit(cases, beginnings, survey, point, role):
    if role in {"middle", "last"} and point in ONLY_ON_THE_COORDINATOR:
        pytest.skip(ONLY_ON_THE_COORDINATOR[point])
    with row(point=str(point), role=role) as about:
        case = cases(point)[role]
        about |= {"world": case.world, "kind": case.kind}
        assert_it_did_no_harm(case, beginnings, about)
        assert about["resumed"] in may_resume(point, survey)


# --- killed around and within writes ---------------------------------------------------------------------


def writes(places):
    """Before and after each kind of write to the run root in the life of one step, in order."""
    changing = ("create", "put", "put_file", "delete")
    return [place for place in dict.fromkeys(places) if place.removeprefix("done ").split()[0] in changing]


@pytest.mark.slow
def test_a_coordinator_killed_around_any_write_to_the_run_root_does_no_harm(beginnings, undisturbed, tmp_path):
    _, (places, _) = undisturbed
    around = writes(places)
    assert {"put_file data", "done create manifests", "create tombstones", "done delete data"} <= set(around)
    for begin in range(0, len(around), SIDE_BY_SIDE):
        batch = around[begin : begin + SIDE_BY_SIDE]
        deaths = [(2, "ddp", 0, Death(place=place)) for place in batch]
        for place, case in zip(batch, died_and_restarted(beginnings, tmp_path / str(begin), deaths), strict=True):
            with row(point=place, role="coordinator", world=2, kind="ddp") as about:
                assert_it_did_no_harm(case, beginnings, about)
                assert about["resumed"] == STEP


WITHIN = {
    "its local shard": Death(Point.PLAN_AGREED, STEP, within=5000),
    "its shard at the run root": Death(Point.ACKED_LOCAL, STEP, within=5000),
    "the manifest": Death(Point.ACKED_REMOTE, STEP, within=10),
}


@pytest.fixture(scope="module")
def torn(beginnings, tmp_path_factory):
    """Ranks that die in the middle of a file: the coordinator, and the last one where it writes such a file."""
    deaths = {(what, role): death for what, death in WITHIN.items() for role in ("coordinator", "last")}
    del deaths["the manifest", "last"]
    found = died_and_restarted(
        beginnings,
        tmp_path_factory.mktemp("torn"),
        [(3, "fsdp", victim_of(role, 3), death) for (_, role), death in deaths.items()],
    )
    return dict(zip(deaths, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("what", "role"), [(what, role) for what in WITHIN for role in ("coordinator", "last")][:-1])
def test_killed_in_the_middle_of_a_file_the_job_loses_no_commit_and_goes_on_to_the_last_bit(
    beginnings, torn, what, role
):
    with row(point=f"within {what}", role=role, world=3, kind="fsdp") as about:
        case = torn[what, role]
        assert_it_did_no_harm(case, beginnings, about)
        assert about["resumed"] == (CARRIED if what == "its local shard" else STEP)


@pytest.mark.slow
def test_what_a_writer_that_was_killed_had_not_finished_is_gone_after_the_next_commit(torn):
    for case in torn.values():
        assert unfinished(case.place) == []


# --- what is the same for all -----------------------------------------------------------------------------


def assert_it_did_no_harm(case, beginnings, about):
    assert_the_victim_died(case)
    about |= assert_the_live_ranks_know(case)
    assert_nothing_reported_is_lost(case)
    about["resumed"] = assert_the_restart_is_exact(case, beginnings)
    assert_nothing_is_left_behind(case.place, about["resumed"])


def assert_the_victim_died(case):
    dead = {outcome.rank for outcome in case.outcomes if outcome.signal in {signal.SIGKILL, signal.SIGXFSZ}}
    assert dead == (set(range(case.world)) if case.victim == "all" else {case.victim}), "this point was not reached"


def assert_the_live_ranks_know(case):
    """All of them the same thing, in time; an error blames the dead."""
    alive = [outcome for outcome in case.outcomes if case.victim not in (outcome.rank, "all")]
    results = values(alive)
    errors = [result["error"] for result in results if "error" in result]
    if not errors:
        return {"error": None}
    assert len(errors) == len(results)
    assert len({told_alike(error) for error in errors}) == 1, errors
    assert blamed(errors[0]) == {case.victim}, errors[0].text
    struck = killed_at(case.place / "second")
    if struck is None:
        return {"error": errors[0].type}
    seconds = max(result["heard at"] for result in results) - struck
    assert seconds < 2 * IMPATIENT_S + SLACK_S
    return {"error": errors[0].type, "seconds": round(seconds, 2), "deadline_s": IMPATIENT_S}


def told_alike(error):
    content = {name: value for name, value in error.attributes.items() if name != "waited_s"}
    return error.type, repr(sorted(content.items()))


def blamed(error):
    named = set(error.attributes.get("missing", ())) | {f["rank"] for f in error.attributes.get("failures", ())}
    return named or {int(rank) for rank in re.findall(r"\d+", str(error.attributes.get("reason")))}


def assert_nothing_reported_is_lost(case):
    whole = [step for step, state in case.committed_then if state == "committed"]
    assert max(reported(case.place), default=0) <= max(whole)
    assert max(whole) >= CARRIED or whole == [1, 2]


def assert_the_restart_is_exact(case, beginnings):
    results = values(case.restarted)
    starts = {start for start, *_ in results}
    assert len(starts) == 1
    (start,) = starts
    assert start >= max(step for step, state in case.committed_then if state == "committed")
    reference = beginnings(case.world, case.kind).reference
    for (_, losses, weights, own), (all_losses, all_weights, all_own) in zip(results, reference, strict=True):
        assert losses == all_losses[start:]
        assert weights == all_weights
        assert own == all_own
    return start


def assert_nothing_is_left_behind(place, resumed):
    """The commits that the policy keeps, and nothing else, on both tiers."""
    found = dcpsvc.list_checkpoints(place / "run")
    assert [(one.step, one.state) for one in found] == [(s, "committed") for s in (resumed, STEPS - 1, STEPS)]
    assert dcpsvc.latest(place / "run").step == STEPS
    assert debris(place / "run", found) == []
    assert empty_folders(place / "run") == []
    for node in place.glob("node-*"):
        assert debris(node, found[-2:]) == []
        assert empty_folders(node) == []
