"""Simulated time, processes and threads: one thread of Python, one greenlet per simulated thread, one seed.

Whatever a simulated thread does that takes time is :meth:`Kernel.wait` or :meth:`Kernel.park`: the scheduler takes
over and lets happen, in the order of simulated time, what comes next. Nothing else switches, so a seed gives one
history and gives it again.
"""

from __future__ import annotations

import heapq
import itertools
import random
import re
import zlib
from typing import TYPE_CHECKING, Any, TypeVar

from greenlet import getcurrent, greenlet

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_THIS_MACHINE = re.compile(r", process \d+ on [^)]*")
"""A claim says who made it, and when by the machine's clock: no part of the history."""

_MASK = (1 << 64) - 1


class Killed(BaseException):
    """Raised at every switch point of a process that is no more, until nothing of it is left."""


class StuckError(Exception):
    """A schedule that did not come to an end."""


class Process:
    """A simulated operating-system process: its threads are killed, frozen and thawed together."""

    __slots__ = ("backlog", "dead", "frozen", "name", "on_death", "since", "slowness", "stops", "tasks")

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = self.frozen = False
        self.since = 0.0
        self.stops: list[tuple[float, float]] = []
        self.slowness = 1.0
        self.tasks: list[Task] = []
        self.backlog: list[tuple[Task, int]] = []
        self.on_death: list[Callable[[], None]] = []

    @property
    def runs(self) -> bool:
        return not (self.dead or self.frozen)

    def frozen_since(self, moment: float) -> float:
        """Seconds it has stood still after a moment."""
        return sum(end - max(begin, moment) for begin, end in self.stops if end > moment)


class Task:
    """A simulated thread."""

    __slots__ = ("done", "failure", "greenlet", "name", "process", "result", "started", "turn", "waiter")

    def __init__(self, process: Process, name: str) -> None:
        self.process, self.name = process, name
        self.done = self.started = False
        self.turn = 0
        self.result: Any = None
        self.failure: BaseException | None = None
        self.waiter: Task | None = None
        self.greenlet: greenlet


class Kernel:
    """The scheduler of one history."""

    def __init__(self, seed: int, *, tracing: bool = False, max_events: int = 200_000) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.events = 0
        self.switches = 0
        self.fingerprint = 0
        self.trace: list[str] | None = [] if tracing else None
        self.current: Task | None = None
        self.failure: Exception | None = None
        self._heap: list[tuple[float, int, Any, int]] = []
        self._ordinals = itertools.count()
        self._hub = getcurrent()
        self._max_events = max_events
        self.processes: list[Process] = []
        self._doomed: list[Process] = []
        self._codes: dict[str, int] = {}

    # --- what simulated threads call ----------------------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        """Let time pass for the calling thread."""
        task = self.current
        assert task is not None
        process = task.process
        if process.dead:
            raise Killed
        at = self.now + seconds
        heap = self._heap
        if not process.frozen and (not heap or at < heap[0][0]) and self.failure is None:
            self.now = at  # nobody else has anything to do before: no need to switch
        else:
            heapq.heappush(heap, (at, next(self._ordinals), task, task.turn))
            self._switch()
        if process.dead:
            raise Killed

    def park(self, seconds: float) -> None:
        """Wait until woken, or for so long."""
        task = self.current
        assert task is not None
        if task.process.dead:
            raise Killed
        heapq.heappush(self._heap, (self.now + seconds, next(self._ordinals), task, task.turn))
        self._switch()
        if task.process.dead:
            raise Killed

    def wake(self, task: Task) -> None:
        """Let a parked thread run on."""
        heapq.heappush(self._heap, (self.now, next(self._ordinals), task, task.turn))

    def at(self, seconds: float, action: Callable[[], None]) -> None:
        """Something that happens in the world, to nobody in particular, so much later. It must not wait."""
        heapq.heappush(self._heap, (self.now + seconds, next(self._ordinals), action, 0))

    def spawn(self, process: Process, name: str, work: Callable[[], Any]) -> Task:
        """A thread of a process; runs when its turn comes."""
        if process.dead:
            raise Killed
        task = Task(process, name)
        process.tasks.append(task)
        task.greenlet = greenlet(lambda: self._main(task, work), parent=self._hub)
        heapq.heappush(self._heap, (self.now, next(self._ordinals), task, task.turn))
        return task

    def join(self, task: Task, seconds: float) -> bool:
        """Wait for a thread's end, at most so long; whether it has ended."""
        ends = self.now + seconds
        while not task.done and self.now < ends:
            task.waiter = self.current
            self.park(ends - self.now)
        task.waiter = None  # whoever gave up waiting must not be woken out of something else
        return task.done

    # --- what the world does to processes -----------------------------------------------------------------------

    def kill(self, process: Process) -> None:
        """SIGKILL. What the process asked others for may still happen; it itself does nothing more."""
        if process.dead:
            return
        process.dead, process.frozen = True, False
        self.note("kill", process.name)
        self._doomed.append(process)
        if self.current is None:
            self._reap()

    def freeze(self, process: Process, seconds: float) -> None:
        """SIGSTOP, and SIGCONT so much later."""
        if process.runs:
            process.frozen, process.since = True, self.now
            self.note("freeze", process.name)
            stop = self.now
            self.at(seconds, lambda: self.thaw(process) if process.since == stop else None)

    def thaw(self, process: Process) -> None:
        """SIGCONT."""
        if process.dead or not process.frozen:
            return
        process.frozen = False
        process.stops.append((process.since, self.now))
        self.note("thaw", process.name)
        for task, turn in process.backlog:
            delay = self.random.random() * 0.001
            heapq.heappush(self._heap, (self.now + delay, next(self._ordinals), task, turn))
        process.backlog.clear()

    def note(self, what: str, detail: str = "") -> None:
        """Part of the history: goes into its fingerprint, and into the trace if there is one."""
        code = self._codes.get(what)
        if code is None:
            code = self._codes[what] = zlib.crc32(what.encode())
        self.fingerprint = (self.fingerprint * 1000003 + code + int(self.now * 1e6)) & _MASK
        if detail:
            told = _THIS_MACHINE.sub("", detail)
            self.fingerprint = (self.fingerprint * 1000003 + zlib.crc32(told.encode())) & _MASK
        if self.trace is not None:
            who = f"{self.current.process.name}/{self.current.name}" if self.current else "world"
            self.trace.append(f"{self.now:10.6f} {who:<18} {what} {detail}")

    # --- running ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until nothing is left to happen.

        Raises:
            StuckError: There is always something.
            Exception: Somebody has set ``failure``.
        """
        heap = self._heap
        while heap:
            at, _, target, turn = heapq.heappop(heap)
            self.events += 1
            if self.events > self._max_events:
                raise StuckError(f"after {self._max_events} events, at {at:.1f} s, it still goes on")
            if type(target) is not Task:
                self.now = at
                target()
            elif turn == target.turn and not target.done and not target.process.dead:
                if target.process.frozen:
                    target.process.backlog.append((target, turn))
                    continue
                self.now = at
                self._resume(target)
            if self._doomed:
                self._reap()
            if self.failure is not None:
                raise self.failure

    def end(self) -> None:
        """Unwind whatever still exists, so that nothing of this history runs on inside another."""
        self._heap.clear()
        for process in self.processes:
            process.on_death.clear()
            self.kill(process)

    # --- inside -------------------------------------------------------------------------------------------------

    def _switch(self) -> None:
        self.switches += 1
        self._hub.switch()

    def _resume(self, task: Task) -> None:
        task.turn += 1
        task.started = True
        self.current = task
        try:
            task.greenlet.switch()
        finally:
            self.current = None

    def _main(self, task: Task, work: Callable[[], Any]) -> None:
        try:
            task.result = work()
        except Killed:
            pass
        except BaseException as err:  # noqa: BLE001 - whoever waits for the thread hears of it
            task.failure = err
        task.done = True
        if task.process.dead:
            return
        task.process.tasks.remove(task)
        if task.waiter is not None:
            self.wake(task.waiter)
        elif isinstance(task.failure, Exception) and task.name == "main":
            self.failure = self.failure or task.failure

    def _reap(self) -> None:
        while self._doomed:
            process = self._doomed.pop()
            for task in process.tasks:
                if task.started and not task.done:
                    self.current = task
                    task.greenlet.throw(Killed)
                    self.current = None
                task.done = True
            process.tasks.clear()
            process.backlog.clear()
            for action in process.on_death:
                action()
