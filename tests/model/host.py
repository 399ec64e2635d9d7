"""Where one rank runs: its process, its node with a disk, its part of the network; and how all that falls."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from dcpsvc.errors import StoreError
from dcpsvc.format.keys import NO_EPOCH
from tests.model.kernel import Killed, Process

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.model.faults import Faults
    from tests.model.kernel import Kernel
    from tests.model.plot import Request
    from tests.model.states import GlobalState

T = TypeVar("T")


class Node:
    """A machine with a disk. It can go down with everything that runs on it, and its disk can be lost."""

    def __init__(self, name: str, disk: str) -> None:
        self.name, self.disk = name, disk
        self.hosts: list[Host] = []

    def go_down(self, kernel: Kernel) -> None:
        """Every process on it is gone at once; no connection is closed."""
        for host in self.hosts:
            kernel.kill(host.process)


class Host:
    """One rank's place.

    Attributes:
        rank: Global rank.
        token: Its job's name.
        epoch: Its job's claim on the run root, once it has one.
        acked: When it last knew all shards of a save to be at the run root.
        step: Which save it is at, counted from its start.
        cut_until: Until then nothing but the run root and the own disk is reached.
        troubled: The ranks' store has failed this rank since its save began: it may have to decide for itself.
        ambush: What waits for this rank at one point.
        ambush_label: Which.
        request: What its next write becomes.
        refuses_upload: The run root does not take what it sends now.
        visits: Points at which it might have fallen.
    """

    def __init__(  # noqa: PLR0917
        self, kernel: Kernel, faults: Faults, node: Node, rank: int, name: str, state: GlobalState
    ) -> None:
        self.kernel, self.faults, self.node, self.rank = kernel, faults, node, rank
        self.process = Process(name)
        self.token = ""
        self.epoch = NO_EPOCH
        self.acked = 0.0
        self.step = 0
        self.cut_until = 0.0
        self.troubled = False
        self.visits: set[str] = set()
        self.ambush: Callable[[Host], None] | None = None
        self.ambush_label = ""
        self.request: Request | None = None
        self.refuses_upload = False
        self._state = state
        kernel.processes.append(self.process)
        node.hosts.append(self)

    @property
    def cut(self) -> bool:
        """Whether the other ranks are out of reach."""
        return self.kernel.now < self.cut_until

    @property
    def role(self) -> str:
        """For the list of crash points."""
        return "coordinator" if self.rank == 0 else "other"

    def cut_off(self, seconds: float) -> None:
        """A partition: this node's ranks and the ranks' store do not reach each other."""
        for host in self.node.hosts:
            host.cut_until = max(host.cut_until, self.kernel.now + seconds)
        self.kernel.note("partition", self.node.name)

    def at_switch(self, label: str) -> None:
        """A point at which this rank may fall."""
        self.visits.add(label)
        self.kernel.note(label)
        if self.ambush is not None and label == self.ambush_label:
            self.ambush(self)
        self._state.put(self.process.name, (self.step, label))

    def send(self, label: str, effect: Callable[[], object]) -> None:
        """The request may land at any time; the answer never comes, and the sender may die at once."""
        assert self.request is not None
        request, self.request = self.request, None
        request.effect = lambda: _quietly(effect)
        if request.is_last:
            self.faults.crash_points[f"{label} ({self.role}) in flight"] += 1
            self.kernel.kill(self.process)
            raise Killed
        self.kernel.wait(600.0)

    def fall(self, fault: str, label: str, effect: Callable[[], T], seconds: float, *, in_flight: bool = False) -> T:
        """Crash or freeze: before what was under way took effect, right after it, or with the request on its way."""
        kernel = self.kernel
        when = kernel.random.choice(("before", "after", "in flight") if in_flight else ("before", "after"))
        kernel.note(f"{fault} {when} {label}")
        if fault == "freeze":
            return self._freeze(when == "before", effect, seconds)
        self.faults.crash_points[f"{label} ({self.role}) {when}"] += 1
        if when == "after":
            _quietly(effect)
        elif when == "in flight":
            kernel.at(kernel.random.random() * 6.0, lambda: _quietly(effect))
        if fault == "host-down":
            self.node.go_down(kernel)
        else:
            kernel.kill(self.process)
        raise Killed

    def _freeze(self, before: bool, effect: Callable[[], T], seconds: float) -> T:  # noqa: FBT001
        kernel = self.kernel
        stopped_s = kernel.random.choice((0.3, 1.5, 5.0, 20.0)) * kernel.random.random()
        kernel.freeze(self.process, stopped_s)
        if before:
            kernel.wait(seconds)
            return effect()
        result = effect()
        kernel.wait(seconds)
        return result


def _quietly(effect: Callable[[], object]) -> None:
    """Nobody is there to hear what came of it."""
    try:
        effect()
    except StoreError:
        return
