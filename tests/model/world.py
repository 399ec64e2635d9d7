"""One history: starts of a job, one after the other or at once, until a last one in which nothing goes wrong."""

from __future__ import annotations

import contextlib
import logging
import random
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.model.faults import Faults
from tests.model.host import Host, Node
from tests.model.invariants import BrokenInvariantError, Ledger
from tests.model.kernel import Kernel
from tests.model.plot import Plot
from tests.model.rank import SimRank
from tests.model.settings import Settings
from tests.model.states import Distinct, GlobalState
from tests.model.stores import Snapshot, Space
from tests.model.wires import GroupServer, KeyValueServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.model.settings import Plan

_MOST_STARTS = 10
_HEALED_S = 20.0
"""No fault lasts longer, but for calls that hang for ever."""


@dataclass(slots=True)
class Start:
    """One start of the job."""

    number: int
    ranks: list[SimRank]
    values: KeyValueServer
    agent: bool
    followed: bool = False
    assembled: int = 0
    calm: bool = False

    @property
    def running(self) -> list[SimRank]:
        return [rank for rank in self.ranks if not rank.host.process.dead]


@dataclass(slots=True)
class Report:
    """What one history was like."""

    seed: int
    fingerprint: int
    error: str = ""
    outcomes: Counter[str] = field(default_factory=Counter[str])
    faults: Counter[str] = field(default_factory=Counter[str])
    crashes: Counter[str] = field(default_factory=Counter[str])
    visits: set[str] = field(default_factory=set[str])
    events: int = 0
    seconds: float = 0.0
    trace: list[str] = field(default_factory=list[str])


class World:
    """Everything a seed decides."""

    def __init__(self, seed: int, distinct: Distinct, *, tracing: bool = False) -> None:
        self.seed = seed
        random.seed(seed)  # tenacity's jitter
        self.kernel = Kernel(seed, tracing=tracing)
        self._random = draw = self.kernel.random
        self.faults = Faults(draw)
        self.state = GlobalState(distinct)
        self.root = Space("root")
        self.disks: dict[str, Space] = {}
        self.settings = Settings.draw(draw, stale_listings=self.faults.stale_listings)
        if self.settings.ambush and draw.random() < 0.5:
            self.faults.left = min(self.faults.left, 1)  # so that the plot is not spoilt
        self._plot = Plot(self)
        self.ledger = Ledger(self.kernel, self.root, self.settings.keep_newest)
        self.starts: list[Start] = []
        self._nodes: list[Node] = []
        self._final: Start | None = None

    def run(self) -> Report:
        """The whole history, judged."""
        error = ""
        try:
            self._start()
            self.kernel.run()
            if self.ledger.ghosts:  # whether they stay shows when the job is started once more
                self._start(final=True)
                self.kernel.run()
            self._judge()
        except Exception as err:  # noqa: BLE001 - reported with its seed
            error = f"{type(err).__name__}: {err}"
            if self.kernel.trace is not None:
                self.kernel.trace += traceback.format_exc().splitlines()
        fingerprint = self.kernel.fingerprint
        self.kernel.end()
        return Report(
            seed=self.seed,
            fingerprint=fingerprint,
            error=error,
            outcomes=self.ledger.outcomes,
            faults=self.faults.count,
            crashes=self.faults.crash_points,
            visits={
                f"{label} ({rank.host.role})"
                for start in self.starts
                for rank in start.ranks
                for label in rank.host.visits
            },
            events=self.kernel.events,
            seconds=self.kernel.now,
            trace=self.kernel.trace or [],
        )

    def assemble(self, plan: Plan) -> bool:
        """Wait until all ranks of a start have done what they had to, and faults are over; whether all still are."""
        start = next(start for start in self.starts if start.ranks[0].plan is plan)
        start.assembled += 1
        while start.assembled < len(start.ranks) and len(start.running) == len(start.ranks):
            self.kernel.wait(0.5)
        if start.assembled < len(start.ranks):
            return False
        if not start.calm:
            start.calm = True
            self.faults.calm += 1
        self.kernel.wait(_HEALED_S)
        return len(start.running) == len(start.ranks)

    # --- starts -------------------------------------------------------------------------------------------------

    def _start(self, *, final: bool = False) -> None:
        draw = self._random
        plan = self.settings.plan(draw, last=final)
        number = len(self.starts)
        values, groups = KeyValueServer(), GroupServer()
        start = Start(number, [], values, agent=draw.random() < 0.5)
        self.starts.append(start)
        self.kernel.note("start", f"{number} with {plan.world_size} ranks{', the last one' if final else ''}")
        for rank, node in enumerate(self._places(plan.world_size)):
            host = Host(self.kernel, self.faults, node, rank, f"{number}.{rank}", self.state)
            if draw.random() < 0.1:
                host.process.slowness = 8.0
            process = SimRank(self, host, plan, values, groups)
            start.ranks.append(process)
            if rank == 0:
                self._plot.cast(start, host, final=final)
            host.process.on_death.append(self._watcher(start, process, groups))
            self.kernel.spawn(host.process, "main", self._delayed(process.main, draw.random() * 0.2))
        if final:
            self._final = start
            return
        if draw.random() < self.settings.splits:
            self.kernel.at(draw.random() * 4.0, lambda: self.follow(start))
        if draw.random() < self.settings.raids:
            self.kernel.at(draw.random() * 3.0, lambda: self._kill_rest(start))

    def _delayed(self, main: Callable[[], None], seconds: float) -> Callable[[], None]:
        def work() -> None:
            self.kernel.wait(seconds)
            main()

        return work

    def _places(self, world_size: int) -> list[Node]:
        """A node for each rank: an old one with its disk where nobody is in the way, or a new one."""
        draw = self._random
        free = [
            node for node in self._nodes if self.settings.shares_nodes or all(host.process.dead for host in node.hosts)
        ]
        draw.shuffle(free)
        places: list[Node] = []
        for rank in range(world_size):
            if rank % self.settings.ranks_per_node:
                places.append(places[-1])
                continue
            ranks = set(range(rank, rank + self.settings.ranks_per_node))
            fit = [node for node in free if not any(h.rank in ranks and not h.process.dead for h in node.hosts)]
            node = fit[0] if fit and draw.random() < 0.85 else self._new_node()
            if node in free:
                free.remove(node)
            places.append(node)
        return places

    def _new_node(self) -> Node:
        name = f"node{len(self._nodes)}"
        node = Node(name, name)
        self.disks[name] = Space(name)
        self._nodes.append(node)
        return node

    # --- ends ---------------------------------------------------------------------------------------------------

    def _watcher(self, start: Start, rank: SimRank, groups: GroupServer) -> Callable[[], None]:
        return lambda: self._ended(start, rank, groups)

    def _ended(self, start: Start, rank: SimRank, groups: GroupServer) -> None:
        draw = self._random
        self.state.put(("process", start.number, rank.host.rank), "ended" if rank.finished else "dead")
        if not rank.finished:
            self.ledger.outcomes["processes killed"] += 1
            if draw.random() < 0.7:
                for group in groups.generations.values():
                    group.broken = True
            if rank.host.rank == 0 and self.settings.fragile_store:
                start.values.down = True
        if not start.running:
            self.ledger.resumed.pop(rank.host.epoch, None)
            self.faults.calm -= start.calm
        if start is self._final:
            self._end_or_try_again(start)
        elif not start.running:
            self.follow(start)
        elif start.agent and not rank.finished:
            self.kernel.at(draw.random() * 6.0, lambda: self._kill_rest(start))
        else:
            self.kernel.at(1.0 + draw.random() * 6.0, lambda: self.follow(start))

    def _end_or_try_again(self, start: Start) -> None:
        """A claim that a dead job had sent may land late and refuse a living one, which is then started again."""
        if not start.running and self.ledger.owner > start.ranks[0].host.epoch and len(self.starts) < _MOST_STARTS:
            self.ledger.outcomes["the last start was refused by a claim that landed late"] += 1
            self.kernel.at(1.0, lambda: self._start(final=True))

    def _kill_rest(self, start: Start) -> None:
        if start.assembled < len(start.ranks):
            for rank in start.running:
                self.kernel.kill(rank.host.process)

    def follow(self, start: Start, gap_s: float | None = None) -> None:
        """The next start, once for each."""
        if start.followed:
            return
        start.followed = True
        gap_s = 0.5 + self._random.random() if gap_s is None else gap_s
        if len(self.starts) <= self.settings.most_starts - 1:
            self.kernel.at(gap_s, self._start)
        else:
            self.kernel.at(gap_s, self._last_start)

    def _last_start(self) -> None:
        """From here on nothing goes wrong; what was frozen or is left over may still do what it was about to do."""
        self.faults.calm += 1
        for start in self.starts:
            for rank in start.running:
                if rank.host.epoch.number == 0:
                    self.kernel.kill(rank.host.process)
        self._start(final=True)

    def _judge(self) -> None:
        """At the end a stranger looks."""
        final = self._final
        if final is None:
            raise BrokenInvariantError("no last start")
        steps = {rank.last_step for rank in final.ranks}
        newest = max((attempt.step for attempt in self.ledger.valid), default=-1)
        if steps != {newest}:
            raise BrokenInvariantError(f"the last job saved step {sorted(steps)}, the newest commit is {newest}")
        self.ledger.tidied(final.ranks[0].host.epoch, newest)
        snapshot = Snapshot(self.root)
        self.ledger.outcomes["commits at the end"] += len(self.ledger.valid)
        shards = [entry for entry in snapshot.list("data/") if entry.key not in self.ledger.needed]
        self.ledger.outcomes["shards of no commit at the end"] += len(shards)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Thousands of failed saves would log a line each."""
    logger = logging.getLogger("dcpsvc")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def play(seed: int, distinct: Distinct | None = None, *, tracing: bool = False) -> Report:
    """One seed's history."""
    return World(seed, distinct or Distinct(), tracing=tracing).run()
