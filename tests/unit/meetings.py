"""Ranks as threads of one process, on one store and a clock of their own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from dcpsvc.ranks.c10d import SoloStore
from dcpsvc.ranks.rendezvous import DisagreementError, Meeting, Rendezvous

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.errors import RankFailure

TIMEOUT_S = 10.0
MEETING = Meeting(TIMEOUT_S)


class Clock:
    """Time passes when everybody who waits has waited: an hour takes a moment, and no rank runs ahead of another."""

    def __init__(self, sleepers: int) -> None:
        self._turn = threading.Condition()
        self._now, self._sleepers = 0.0, sleepers
        self._alarms: list[float] = []

    def now(self) -> float:
        with self._turn:
            return self._now

    def sleep(self, seconds: float) -> None:
        with self._turn:
            alarm = self._now + seconds
            self._alarms.append(alarm)
            self._advance()
            while self._now < alarm:
                self._turn.wait()
            self._alarms.remove(alarm)

    def leave(self) -> None:
        """One rank has gone, and need not be waited for any more."""
        with self._turn:
            self._sleepers -= 1
            self._advance()

    def _advance(self) -> None:
        asleep = [alarm for alarm in self._alarms if alarm > self._now]
        if asleep and len(asleep) >= self._sleepers:
            self._now = min(asleep)
            self._turn.notify_all()


class Ranks:
    """A job: some of its ranks, on one store and one clock."""

    def __init__(self, world_size: int, store: SoloStore | None = None) -> None:
        self.world_size, self.store = world_size, store or SoloStore()
        self.heard_at: dict[int, float] = {}

    def meet(
        self,
        messages: dict[int, Any],
        decide: Callable[[list[Any]], Any] = list,
        *,
        meeting: Meeting = MEETING,
        late: dict[int, float] | None = None,
        beating: tuple[int, ...] = (),
        where: str = "save/plan",
    ) -> dict[int, Any]:
        """What each rank that brings a message hears: the decision, or the DisagreementError."""
        clock = Clock(len(messages) + len(beating))

        def run(rank: int) -> Any:
            rendezvous = Rendezvous(rank, self.world_size, self.store, clock, "run")
            try:
                if late and rank in late:
                    clock.sleep(late[rank])
                return rendezvous.meet(where, messages[rank], decide, meeting)
            except DisagreementError as err:
                return err
            finally:
                self.heard_at[rank] = clock.now()
                clock.leave()

        def beat(rank: int) -> None:
            rendezvous = Rendezvous(rank, self.world_size, self.store, clock, "run")
            for count in range(40):
                rendezvous.beat(count)
                clock.sleep(TIMEOUT_S / 20)
            clock.leave()

        with ThreadPoolExecutor(len(messages) + len(beating)) as pool:
            hearts = [pool.submit(beat, rank) for rank in beating]
            heard = {rank: pool.submit(run, rank) for rank in messages}
            for heart in hearts:
                heart.result()
            return {rank: future.result() for rank, future in heard.items()}


def assert_all_heard(
    heard: dict[int, Any], *, missing: tuple[int, ...] = (), failures: tuple[RankFailure, ...] = ()
) -> None:
    for answer in heard.values():
        assert isinstance(answer, DisagreementError)
        assert (answer.missing, answer.failures) == (missing, failures)
