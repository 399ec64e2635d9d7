"""The watchers of a whole job in one process, and a store that says when they have looked."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Self

from dcpsvc.ranks.c10d import SoloStore
from dcpsvc.ranks.proposals import Proposals
from dcpsvc.ranks.rendezvous import Rendezvous

if TYPE_CHECKING:
    from collections.abc import Callable

WORLD = 3
BOUND_S = 20.0


class Clock:
    """One second a look, so that the job seems to run a step a second or slower."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        self._now += 1.0
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

    def until(self, key: str) -> str:
        with self.written:
            assert self.written.wait_for(lambda: super(Watched, self).get(key) is not None, BOUND_S), f"no {key}"
        return super().get(key) or ""


class Job:
    """The watchers of all ranks on one store."""

    def __init__(self, due: Callable[[], bool] = lambda: False) -> None:
        self.store = Watched()
        self.ranks = [Proposals(Rendezvous(rank, WORLD, self.store, Clock(), "run"), due) for rank in range(WORLD)]

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

    def proposed(self, number: int) -> int:
        """The step of a proposal."""
        return json.loads(self.store.until(f"run/proposals/{number}/what"))["step"]

    def verdict(self, number: int) -> str:
        return self.store.until(f"run/proposals/{number}/verdict")

    def noted(self, number: int) -> list[str]:
        return [self.store.until(f"run/proposals/{number}/seen/{rank}") for rank in range(WORLD)]
