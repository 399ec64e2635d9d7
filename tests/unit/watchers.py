"""The watchers of a whole job in one process: on threads of their own, or looking when they are told to."""

from __future__ import annotations

import itertools
import json
import threading
from typing import TYPE_CHECKING, Self

from dcpsvc.deadline import SystemClock
from dcpsvc.ranks.c10d import SoloStore
from dcpsvc.ranks.proposals import Proposals
from dcpsvc.ranks.rendezvous import Rendezvous

if TYPE_CHECKING:
    from collections.abc import Callable

WORLD = 3
BOUND_S = 20.0


class Clock(SystemClock):
    """Every question takes some seconds, so that the job seems to run a step a second or slower."""

    def __init__(self, seconds: float = 1.0) -> None:
        self._now, self._seconds = 0.0, seconds

    def now(self) -> float:
        self._now += self._seconds
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


class Watched(SoloStore):
    """Wakes the test at every key that is written or asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Condition()
        self.looks = 0

    def set(self, key: str, value: str) -> None:
        super().set(key, value)
        with self.written:
            self.written.notify_all()

    def compare_set(self, key: str, desired: str) -> str:
        stands = super().compare_set(key, desired)
        with self.written:
            self.written.notify_all()
        return stands

    def get(self, key: str) -> str | None:
        with self.written:
            self.looks += 1
            self.written.notify_all()
        return super().get(key)

    def looked(self, times: int) -> None:
        """Until the watchers have asked for this many keys more."""
        with self.written:
            enough = self.looks + times
            assert self.written.wait_for(lambda: self.looks >= enough, BOUND_S), "nobody watches"

    def until(self, key: str, begins: str = "") -> str:
        """What stands under a key, once it begins like this."""

        def stands() -> str | None:
            text = self.peek(key)
            return text if text is not None and text.startswith(begins) else None

        with self.written:
            text = self.written.wait_for(stands, BOUND_S)
        assert text, f"no {key} {begins}"
        return text

    def peek(self, key: str) -> str | None:
        return super().get(key)


class Job:
    """The watchers of all ranks on one store, each on its thread."""

    def __init__(
        self,
        due: Callable[[], bool] = lambda: False,
        *,
        world: int = WORLD,
        step_s: float = 1.0,
        store: Watched | None = None,
    ) -> None:
        self.store = store or Watched()
        self.ranks = [
            Proposals(Rendezvous(rank, world, self.store, Clock(step_s), "run"), due) for rank in range(world)
        ]

    def __enter__(self) -> Self:
        for rank in self.ranks:
            rank.start()
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank._stopped.set()
        for rank in self.ranks:
            rank.stop()

    def at(self, step: int) -> list[str | None]:
        """What each rank is told at ``step``."""
        return [rank.at(step) for rank in self.ranks]

    def look(self, times: int = 1) -> None:
        """All watchers look, the coordinator last; for a job that is not started."""
        for _ in range(times):
            for rank in (*self.ranks[1:], self.ranks[0]):
                rank.look()

    def agree(self) -> None:
        """All watchers look as often as an agreement takes: ask and propose, note, settle, hear."""
        self.look(4)

    def done(self, steps: range | list[int]) -> list[tuple[int, str]]:
        """What is done at which step, the watchers looking in between; every rank does the same."""
        found: list[tuple[int, str]] = []
        for step in steps:
            told = self.at(step)
            assert len(set(told)) == 1, f"step {step}: {told}"
            found += [(step, told[0])] if told[0] else []
            self.look()
        return found

    def proposed(self, number: int) -> int:
        """The step of a proposal."""
        return json.loads(self.store.until(f"run/proposals/{number}/what"))["step"]

    def agreed(self, kind: str) -> list[int]:
        """The steps of all proposals of a kind that all agreed on."""
        steps = []
        for number in itertools.takewhile(self.is_proposed, itertools.count()):
            what = json.loads(self.store.peek(f"run/proposals/{number}/what") or "")
            went = self.store.peek(f"run/proposals/{number}/verdict") == "go"
            steps += [what["step"]] if went and what["kind"] == kind else []
        return steps

    def is_proposed(self, number: int) -> bool:
        return self.store.peek(f"run/proposals/{number}/what") is not None

    def verdict(self, number: int) -> str:
        return self.store.until(f"run/proposals/{number}/verdict")

    def noted(self, number: int) -> list[str]:
        """What each rank said to a proposal: ``noted`` or ``late``."""
        return [
            self.store.until(f"run/proposals/seen/{rank}", f"{number} ").split()[1] for rank in range(len(self.ranks))
        ]
