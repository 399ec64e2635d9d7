"""L3 L5 L7: a job that cannot start says why on every rank, leaves nothing behind, and starts when it can."""

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from dcpsvc.errors import StoreAccessError, StoreError
from tests.ranks.faults import Crew, FaultyStore, Trap, at_rest, record, settled_difference, stop_self
from tests.ranks.harness import Job, raised_by, run_jobs, values
from tests.ranks.lives import ROLES, SLACK_S, causes_first
from tests.ranks.models import SYNC_S as PATIENT_S
from tests.ranks.models import Training, checkpointer
from tests.ranks.rounds import BOUND_S, SYNC_S, UPLOAD_S, victim_of

WORLD = 3


class Start:
    """Opens, resumes and closes again and again, on one rank."""

    def __init__(self, rank, world, place, victim):
        self.rank, self.world, self.place, self.victim = rank, world, place, victim
        self.crew, self.trap = Crew(rank, world), Trap()
        self.store, self.local = FaultyStore(place / "run", self.trap), place / f"node-{rank}"
        self.training = Training("ddp", rank)

    def open(self, timeout_s=SYNC_S):
        return checkpointer(
            self.place / "run", self.training.state, local=self.local, store=self.store, save_last=False,
            sync_timeout_s=timeout_s, upload_timeout_s=UPLOAD_S,
        )  # fmt: skip

    def whole(self, step=None):
        """A job without faults."""
        with self.open(timeout_s=PATIENT_S) as ckpt:
            resumed = ckpt.resume()
            if step is not None:
                ckpt.save(step).wait(BOUND_S)
        return resumed


@dataclass(frozen=True)
class StartFault:
    """What goes wrong on one rank when the job starts.

    Attributes:
        around: Entered on that rank.
        roles: It may have.
        comes: It makes its Checkpointer at all.
        stops: It hangs until the others have heard.
    """

    around: Callable[[Start], Any]
    roles: tuple[str, ...] = ROLES
    comes: bool = True
    stops: bool = False


def failing(operation, kind):
    def fault(real, key, *args):
        raise kind(operation, key, "not today")

    @contextlib.contextmanager
    def around(start):
        start.store.faults[operation] = fault
        yield
        start.store.faults.clear()

    return around


@contextlib.contextmanager
def stopped_at_its_probe(start):
    start.trap.set("put probes", stop_self)
    yield
    start.trap.set_aside()


@contextlib.contextmanager
def a_file_in_place_of_its_shards(start):
    folders = list(start.local.glob("*/data"))
    for folder in folders:
        folder.rename(folder.with_name("moved"))
        folder.touch()
    yield
    for folder in folders:
        folder.unlink()
        folder.with_name("moved").rename(folder)


FAULTS = {
    "it never makes its Checkpointer": StartFault(lambda _: contextlib.nullcontext(), roles=("other",), comes=False),
    "its probe is refused": StartFault(failing("put probes", StoreAccessError)),
    "run.json cannot be read": StartFault(failing("get run.json", StoreAccessError)),
    "the claims cannot be listed": StartFault(failing("list epochs", StoreError), roles=("coordinator",)),
    "the claim cannot be written": StartFault(failing("create epochs", StoreError), roles=("coordinator",)),
    "the commits cannot be listed": StartFault(failing("list manifests", StoreError), roles=("coordinator",)),
    "it stops at its probe, and comes back": StartFault(stopped_at_its_probe, stops=True),
    "its local disk cannot be listed": StartFault(a_file_in_place_of_its_shards),
}


def begin_again_and_again(rank, world, place, role):
    """A job that cannot start, and one that can, for each fault."""
    start = Start(rank, world, place, victim_of(role, WORLD))
    start.whole(step=1)
    before = at_rest()
    found = {}
    for name, fault in FAULTS.items():
        if role in fault.roles:
            found[name] = begin_beside(start, name, fault)
            found[name]["leaked"] = settled_difference(before)
            start.crew.line(f"{name}: end")
    return found


def begin_beside(start, name, fault):
    start.crew.line(f"{name}: begin")
    at_fault = start.rank == start.victim
    began = time.monotonic()
    with fault.around(start) if at_fault else contextlib.nullcontext():
        error = raised_by(start.open) if fault.comes or not at_fault else None
        heard = time.monotonic()
        if fault.stops and not at_fault:
            others = [rank for rank in range(start.world) if rank != start.victim]
            start.crew.line(f"{name}: heard", others)
            start.crew.wake(start.victim, f"{name}: all heard")
        start.crew.line(f"{name}: all heard")
    start.crew.line(f"{name}: mended")
    return {"error": error, "seconds": heard - began, "resumed": start.whole()}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    jobs = [Job(WORLD, begin_again_and_again, (tmp_path_factory.mktemp("started"), role)) for role in ROLES]
    ended = run_jobs(jobs, timeout_s=180.0)
    return dict(zip(ROLES, map(causes_first, ended), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("role", "name"), [(role, name) for role in ROLES for name, fault in FAULTS.items() if role in fault.roles]
)
def test_a_job_that_cannot_start_says_why_on_every_rank_in_time_and_starts_when_it_can(started, role, name):
    fault, results = FAULTS[name], [found[name] for found in values(started[role])]
    others = [result for rank, result in enumerate(results) if rank != victim_of(role, WORLD)]
    seconds = max(result["seconds"] for result in (others if fault.stops else results))
    deadline_s = SYNC_S if fault.stops or not fault.comes else UPLOAD_S
    row = {"fault": f"at the start: {name}", "role": role, "world": WORLD, "result": "fail", "error": "RootError"}
    try:
        assert_all_hear_of(fault, role, results)
        assert seconds < deadline_s + SLACK_S
        assert [result["resumed"] for result in results] == [1] * WORLD
        assert [result["leaked"] for result in results] == [{}] * WORLD
        row["result"] = "pass"
    finally:
        record("DCPSVC_FAULT_TABLE", **row, seconds=round(seconds, 2), deadline_s=deadline_s)


def assert_all_hear_of(fault, role, results):
    errors = [result["error"] for result in results if result["error"] is not None]
    assert len(errors) == WORLD - (not fault.comes)
    assert {error.type for error in errors} == {"RootError"}, errors
    assert len({re.sub(r"within [0-9.]+ s", "", error.text) for error in errors}) == 1, errors
    victim = victim_of(role, WORLD)
    assert re.search(rf"rank {victim}\b|\({victim},\)", errors[0].text), errors[0].text
