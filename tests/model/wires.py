"""What joins the ranks: a clock of their own, a key-value store, and groups for collectives, all of them simulated.

They keep to the protocols of ``dcpsvc.ranks``, so the production code does not know.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NoReturn, TypeVar

from dcpsvc.deadline import GivenUpError
from dcpsvc.ranks.messages import LostPeerError
from tests.model.kernel import Killed

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.model.host import Host
    from tests.model.kernel import Kernel, Process

T = TypeVar("T")

_POLL_S = 0.1


class SimClock:
    """Simulated time as one process sees it; what is bounded runs on a simulated thread."""

    __slots__ = ("_kernel", "_process")

    def __init__(self, kernel: Kernel, process: Process) -> None:
        self._kernel, self._process = kernel, process

    def now(self) -> float:
        return self._kernel.now

    def sleep(self, seconds: float) -> None:
        """At least so long; a little longer than real machines take, because polling is most of the work."""
        self._kernel.wait(2 * seconds + 0.01 * self._kernel.random.random())

    def bounded(
        self, work: Callable[[], T], timeout_s: float, what: str, given_up: Callable[[], str] | None = None
    ) -> T:
        kernel = self._kernel
        task = kernel.spawn(self._process, "store", work)
        ends = kernel.now + timeout_s
        while not kernel.join(task, min(ends - kernel.now, _POLL_S) if given_up else ends - kernel.now):
            if given_up is not None and (reason := given_up()):
                raise GivenUpError(reason)
            if kernel.now >= ends:
                raise TimeoutError(f"{what} did not end within {timeout_s} s")
        if task.failure is not None:
            raise task.failure
        result: T = task.result
        return result


_MISTAKES = re.compile(r'"(AssertionError|AttributeError|IndexError|KeyError|NameError|TypeError|ValueError)"')


class MistakeError(Exception):
    """Code is wrong, and a broad except has hidden it."""


class SecondVerdictError(Exception):
    """Two decisions of one meeting."""


class KeyValueServer:
    """The c10d store of one start of a job: beside the agent, or inside rank 0's process, with which it dies."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.decided: dict[str, str] = {}
        self.down = False

    def claim(self, key: str, text: str) -> str:
        """Compare and set. A meeting decides once, even after its keys were forgotten."""
        if key not in self.values and key in self.decided:
            raise SecondVerdictError(f"{key} was {self.decided[key]} and is decided again: {text}")
        self.decided.setdefault(key, text)
        return self.values.setdefault(key, text)


class SimKeyValue:
    """One process's connection to it."""

    def __init__(self, host: Host, server: KeyValueServer, grain: float) -> None:
        self._host, self._server, self._grain = host, server, grain
        self._kernel, self._faults = host.kernel, host.faults
        self._process = host.process
        self._random = host.kernel.random.random

    def get(self, key: str) -> str | None:
        if self._process.dead:
            raise Killed
        fault = self._faults.strike("kv-read")
        if fault is not None or self._server.down or self._host.cut:
            return self._troubled(f"kv.get {_phase(key)}", lambda: self._server.values.get(key), fault)
        if self._random() < self._grain:
            self._kernel.wait(self._random() * 0.002 * self._process.slowness)
        return self._server.values.get(key)

    def set(self, key: str, value: str) -> None:
        def effect() -> None:
            self._server.values[key] = value

        self._check(key, value)
        self._write("set", key, effect)

    def compare_set(self, key: str, desired: str) -> str:
        self._check(key, desired)

        def effect() -> str:
            try:
                return self._server.claim(key, desired)
            except SecondVerdictError as err:
                self._kernel.failure = err  # whoever catches it: the history ends here
                raise

        return self._write("compare_set", key, effect)

    def delete(self, key: str) -> None:
        if self._process.dead:
            raise Killed
        if not self._host.cut and not self._server.down:
            self._server.values.pop(key, None)

    def _check(self, key: str, value: str) -> None:
        """A mistake of ours that became a value for a meeting would pass as one of the faults."""
        if "fail" in value and (found := _MISTAKES.search(value)):
            self._kernel.failure = MistakeError(f"{found[0]} at {key}: {value}")

    def _write(self, name: str, key: str, effect: Callable[[], T]) -> T:
        if self._process.dead:
            raise Killed
        label = f"kv.{name} {_phase(key)}"
        self._host.at_switch(label)
        fault = self._faults.strike("kv-write", label)
        if fault is not None or self._host.cut or self._server.down:
            return self._troubled(label, effect, fault)
        seconds = self._random() * 0.003 * self._process.slowness
        if self._random() < 0.5:
            self._kernel.wait(seconds)
            return effect()
        result = effect()
        self._kernel.wait(seconds)
        return result

    def _troubled(self, label: str, effect: Callable[[], T], fault: str | None) -> T:
        host, kernel = self._host, self._kernel
        before = self._random() < 0.5
        if fault == "partition":
            host.cut_off(0.2 + self._random() * 4.0)
        if host.cut or self._server.down:
            host.troubled = True
            kernel.note(f"{label}: unreachable")
            kernel.wait(self._random() * 0.2)
            raise RuntimeError("simulated: connection to the ranks' store was reset")
        match fault:
            case "crash" | "host-down" | "freeze":
                return host.fall(fault, label, effect, 0.002)
            case "refused":
                kernel.note(f"{label}: refused")
                self._refuse()
            case "lost":
                kernel.note(f"{label}: answer lost")
                effect()
                self._refuse()
        kernel.note(f"{label}: slow")
        seconds = self._random() * 0.8
        if before:
            kernel.wait(seconds)
            return effect()
        result = effect()
        kernel.wait(seconds)
        return result

    def _refuse(self) -> NoReturn:
        self._host.troubled = True
        self._kernel.wait(self._random() * 0.05)
        raise RuntimeError("simulated: the ranks' store did not answer")


class _Generation:
    """One group of connections between all ranks. One that fails anywhere fails for everybody who still waits."""

    def __init__(self) -> None:
        self.joined: set[int] = set()
        self.rounds: list[dict[int, bytes]] = []
        self.broken = False


class GroupServer:
    """All generations of the group of one start of a job."""

    def __init__(self) -> None:
        self.generations: dict[int, _Generation] = {}

    def generation(self, number: int) -> _Generation:
        return self.generations.setdefault(number, _Generation())


class SimGroup:
    """One rank's end of it; see :class:`dcpsvc.ranks.c10d.Group`."""

    _POLL_S = 0.02

    def __init__(self, host: Host, server: GroupServer, world_size: int, timeout_s: float) -> None:
        self._host, self._server, self._world_size, self._timeout_s = host, server, world_size, timeout_s
        self._kernel, self._faults = host.kernel, host.faults
        self._group: _Generation | None = None
        self._round = 0
        self.generation = -1
        self.poisoned = False

    def renew(self, generation: int) -> None:
        if generation == self.generation and not self.poisoned:
            return
        self.generation, self.poisoned = generation, True
        group = self._server.generation(generation)
        self._host.at_switch("group.renew")
        fault = self._faults.strike("group", "group.renew")
        if fault in {"crash", "freeze"}:
            self._host.fall(fault, "group.renew", lambda: group.joined.add(self._host.rank), 0.002)
        group.joined.add(self._host.rank)
        self._until(group, lambda: len(group.joined) == self._world_size, "connect")
        self._group, self._round, self.poisoned = group, 0, False

    def all_gather(self, data: bytes) -> list[bytes]:
        group = self._group
        if group is None:
            raise LostPeerError("the group is closed")
        number, self._round = self._round, self._round + 1
        self._host.at_switch("group.all_gather")
        try:
            return self._gathered(group, number, data)
        except LostPeerError:
            self.poisoned = True
            raise

    def _gathered(self, group: _Generation, number: int, data: bytes) -> list[bytes]:
        while len(group.rounds) <= number:
            group.rounds.append({})
        said = group.rounds[number]

        def post() -> None:
            said[self._host.rank] = data

        fault = self._faults.strike("group", "group.all_gather")
        if fault in {"crash", "freeze"}:
            self._host.fall(fault, "group.all_gather", post, 0.002)
        elif fault == "slow":
            self._kernel.wait(self._kernel.random.random() * 0.8)
        post()
        self._until(group, lambda: len(said) == self._world_size, "all_gather")
        if fault == "broken":
            self._kernel.note("group.all_gather: broken")
            group.broken = True
            raise LostPeerError("simulated: connection closed by peer")
        return [said[rank] for rank in range(self._world_size)]

    def _until(self, group: _Generation, complete: Callable[[], bool], what: str) -> None:
        if self._host.process.dead:
            raise Killed
        ends = self._kernel.now + self._timeout_s
        pause = 0.001
        while True:
            self._kernel.wait(pause * self._kernel.random.random())
            if complete():
                return
            if group.broken or self._host.cut or self._kernel.now >= ends:
                group.broken = True
                self._kernel.note(f"group.{what}: failed")
                raise LostPeerError(f"simulated: {what} timed out, or a peer closed its connection")
            pause = min(2 * pause, self._POLL_S)

    def close(self) -> None:
        self._group = None


def _phase(key: str) -> str:
    parts = key.rsplit("/", 2)
    return "alive" if "alive" in parts else f"{parts[-2]}{'/verdict' if parts[-1] == 'verdict' else ''}"
