"""The simulated parts behave as the real ones where nothing goes wrong, and fail as they say where it does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dcpsvc.errors import StoreError, StoreUnavailableError
from dcpsvc.storage.memory import MemoryStore
from tests.model.faults import Faults
from tests.model.host import Host, Node
from tests.model.kernel import Kernel, Killed
from tests.model.plot import Request
from tests.model.states import Distinct, GlobalState
from tests.model.stores import RemoteStore, Space
from tests.model.wires import GroupServer, KeyValueServer, SecondVerdictError, SimClock, SimGroup, SimKeyValue

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.storage.base import Store

NAMES = ["manifests/a.json", "manifests/epochs/b.json", "data/c/d", "data/c/e", "run.json"]
PREFIXES = ["manifests/", "data/", "data/c/", "layouts/", ""]


class Machine:
    """One kernel, some processes, and only the faults a test asks for."""

    def __init__(self, processes: int = 1, *, faults: list[str | None] | None = None) -> None:
        self.kernel = Kernel(1)
        self.space = Space("root")
        self.disks = {"d": Space("d")}
        node = Node("n", "d")
        state = GlobalState(Distinct())
        self.faults = ScriptedFaults(faults or [])
        self.hosts = [Host(self.kernel, self.faults, node, rank, f"p{rank}", state) for rank in range(processes)]

    def store(self, rank: int = 0) -> RemoteStore:
        return RemoteStore(self.hosts[rank], self.space, self.disks)

    def run(self, *works: Callable[[], Any]) -> list[Any]:
        """Each work as the main thread of one process; what came of it."""
        tasks = [self.kernel.spawn(host.process, "work", work) for host, work in zip(self.hosts, works, strict=False)]
        self.kernel.run()
        return [task.failure or task.result for task in tasks]


class ScriptedFaults(Faults):
    def __init__(self, script: list[str | None]) -> None:
        super().__init__(random.Random(0))
        self._script = script

    def strike(self, category: str, label: str | None = None) -> str | None:
        return self._script.pop(0) if self._script else None


def _call(store: Store, source: random.Random) -> Any:
    """A random operation; what it gives, or the type of what it raises."""
    key, data = source.choice(NAMES), bytes(source.randrange(5))
    begin, end = source.randrange(4), source.randrange(4)
    operations: list[Callable[[], Any]] = [
        lambda: store.create(key, data),
        lambda: store.put(key, data),
        lambda: store.get(key, max_nbytes=3),
        lambda: store.read(key, min(begin, end), max(begin, end)),
        lambda: store.list(source.choice(PREFIXES)),
        lambda: store.size(key),
        lambda: store.delete(key),
    ]
    try:
        return source.choice(operations)()
    except StoreError as err:
        return type(err)


def test_a_calm_simulated_store_answers_as_a_real_one() -> None:
    """Except that, as the contract allows, an object of the very same bytes counts as created."""
    machine = Machine()
    simulated, real = machine.store(), MemoryStore("a-calm-store")

    def same(seed: int) -> bool:
        mine, theirs = _call(simulated, random.Random(seed)), _call(real, random.Random(seed))
        return mine == theirs or (mine is True and theirs is False)

    [differing] = machine.run(lambda: [seed for seed in range(500) if not same(seed)])
    assert differing == []


def test_a_file_of_a_simulated_disk_is_carried_whole() -> None:
    machine = Machine()
    machine.disks["d"].objects["data/x"] = b"bytes"
    machine.run(lambda: machine.store().put_file("data/x", Path("/sim/d/data/x")))
    assert machine.space.objects == {"data/x": b"bytes"}


def test_a_truncated_file_says_success() -> None:
    machine = Machine(faults=["truncated"])
    machine.disks["d"].objects["data/x"] = b"bytes" * 9
    assert machine.run(lambda: machine.store().put_file("data/x", Path("/sim/d/data/x"))) == [None]
    assert len(machine.space.objects["data/x"]) < len(b"bytes" * 9)


def test_an_answer_is_lost_and_the_object_is_there() -> None:
    machine = Machine(faults=["lost"])
    [error] = machine.run(lambda: machine.store().create("run.json", b"1"))
    assert isinstance(error, StoreUnavailableError)
    assert machine.space.objects == {"run.json": b"1"}


def test_a_create_that_says_exists_has_created() -> None:
    machine = Machine(faults=["exists"])
    assert machine.run(lambda: machine.store().create("run.json", b"1")) == [False]
    assert machine.space.objects == {"run.json": b"1"}


def test_a_late_write_lands_after_its_writer_has_given_up_and_died() -> None:
    machine = Machine(faults=["late"])
    clock = SimClock(machine.kernel, machine.hosts[0].process)
    there: list[bool] = []

    def work() -> None:
        with pytest.raises(TimeoutError):
            clock.bounded(lambda: machine.store().put("run.json", b"1"), 1.0, "put")
        there.append("run.json" in machine.space.objects)
        machine.kernel.kill(machine.hosts[0].process)

    machine.run(work)
    assert there == [False]
    assert machine.space.objects == {"run.json": b"1"}


def test_a_stale_listing_shows_what_was_there_and_a_later_one_what_is() -> None:
    machine = Machine(faults=[None, "stale", None])
    store = machine.store()

    def work() -> list[int]:
        store.create("data/x", b"1")
        return [len(store.list("data/")), len(store.list("data/"))]

    [[stale, fresh]] = machine.run(work)
    assert stale in {0, 1}
    assert fresh == 1
    assert machine.space.entries_at("data/", -1.0) == []


def test_a_killed_process_takes_no_step_further_even_where_it_catches_everything() -> None:
    machine = Machine(2)
    steps: list[str] = []

    def stubborn() -> None:
        while True:
            try:
                machine.kernel.wait(1.0)
                steps.append("step")
            except BaseException as err:  # production code does that, too
                if not isinstance(err, Killed):
                    raise
                with pytest.raises(Killed):
                    machine.store().put("run.json", b"after death")
                raise

    def killer() -> None:
        machine.kernel.wait(2.5)
        machine.kernel.kill(machine.hosts[0].process)

    machine.run(stubborn, killer)
    assert steps == ["step", "step"]
    assert machine.space.objects == {}


def test_a_frozen_process_goes_on_where_it_stood_and_later() -> None:
    machine = Machine(2)
    times: list[float] = []

    def work() -> None:
        machine.kernel.wait(1.0)
        times.append(machine.kernel.now)

    def freezer() -> None:
        machine.kernel.wait(0.5)
        machine.kernel.freeze(machine.hosts[0].process, 10.0)

    machine.run(work, freezer)
    assert times == [pytest.approx(10.5, abs=0.01)]


def test_a_frozen_process_may_go_on_early_and_an_old_alarm_does_not_thaw_it_again() -> None:
    machine = Machine(2)
    times: list[float] = []

    def work() -> None:
        for _ in range(2):
            machine.kernel.wait(1.0)
            times.append(machine.kernel.now)

    def freezer() -> None:
        process = machine.hosts[0].process
        machine.kernel.wait(0.5)
        machine.kernel.freeze(process, 3.0)
        machine.kernel.wait(1.0)
        machine.kernel.thaw(process)
        machine.kernel.wait(0.5)
        machine.kernel.freeze(process, 3.0)

    machine.run(work, freezer)
    assert times == [pytest.approx(1.5, abs=0.01), pytest.approx(5.0, abs=0.01)]


@pytest.mark.parametrize("is_last", [True, False])
def test_a_request_lands_once_when_it_is_let_whether_or_not_its_sender_lives(is_last: bool) -> None:  # noqa: FBT001
    machine = Machine()
    host, request = machine.hosts[0], Request(is_last=is_last)
    clock = SimClock(machine.kernel, host.process)
    host.request = request
    alive: list[bool] = []
    for moment in (5.0, 9.0):
        machine.kernel.at(moment, request.land)

    def work() -> None:
        with pytest.raises(TimeoutError):
            clock.bounded(lambda: machine.store().create("run.json", b"1"), 1.0, "create")
        alive.append(machine.space.objects == {})
        machine.kernel.wait(5.0)
        machine.store().delete("run.json")
        machine.kernel.wait(5.0)

    machine.run(work)
    assert alive == ([] if is_last else [True])
    assert machine.space.objects == ({"run.json": b"1"} if is_last else {})


def test_whoever_gives_up_waiting_is_not_woken_out_of_something_else() -> None:
    machine = Machine()
    clock = SimClock(machine.kernel, machine.hosts[0].process)

    def work() -> float:
        with pytest.raises(TimeoutError):
            clock.bounded(lambda: machine.kernel.wait(2.0), 1.0, "work")
        began = machine.kernel.now
        machine.kernel.wait(5.0)
        return machine.kernel.now - began

    assert machine.run(work) == [pytest.approx(5.0)]


def test_a_group_gathers_in_rank_order_and_fails_for_all_where_one_stays_away() -> None:
    machine, server = Machine(2), GroupServer()
    groups = [SimGroup(host, server, 2, 1.0) for host in machine.hosts]

    def gather(rank: int, *more: bytes) -> Any:
        groups[rank].renew(0)
        return [groups[rank].all_gather(data) for data in (f"{rank}".encode(), *more)]

    failed, said = machine.run(lambda: gather(0, b"alone"), lambda: gather(1))
    assert said == [[b"0", b"1"]]
    assert isinstance(failed, RuntimeError)
    assert groups[0].poisoned


def test_the_ranks_store_sets_once_and_a_meeting_never_decides_twice() -> None:
    machine, server = Machine(), KeyValueServer()
    wire = SimKeyValue(machine.hosts[0], server, 1.0)

    said: list[str | None] = []

    def work() -> None:
        said.extend([wire.compare_set("m/verdict", "a"), wire.compare_set("m/verdict", "b"), wire.get("m/verdict")])
        wire.delete("m/verdict")
        said.append(wire.get("m/verdict"))
        wire.compare_set("m/verdict", "b")

    with pytest.raises(SecondVerdictError):
        machine.run(work)
    assert said == ["a", "a", "a", None]


def test_who_is_cut_off_reaches_nobody_and_only_for_a_while() -> None:
    machine, server = Machine(), KeyValueServer()
    wire = SimKeyValue(machine.hosts[0], server, 1.0)

    def work() -> str | None:
        machine.hosts[0].cut_off(2.0)
        with pytest.raises(RuntimeError, match="reset"):
            wire.set("m/k", "v")
        machine.kernel.wait(3.0)
        wire.set("m/k", "v")
        return wire.get("m/k")

    assert machine.run(work) == ["v"]
