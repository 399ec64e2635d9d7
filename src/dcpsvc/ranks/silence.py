"""Waiting for other ranks: who has fallen silent, and how often to look."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dcpsvc.deadline import Clock
    from dcpsvc.ranks.rendezvous import Rendezvous


class SignsOfLife:
    """Notices ranks whose heartbeat has not changed for a while."""

    def __init__(self, rendezvous: Rendezvous, silence_s: float | None) -> None:
        self._rendezvous, self._silence_s = rendezvous, silence_s
        self._last: dict[int, tuple[str | None, float]] = {}
        self._next_look = 0.0

    def silent(self, ranks: list[int]) -> list[int]:
        """Which of ``ranks`` are silent for too long."""
        now = self._rendezvous.clock.now()
        if self._silence_s is None or now < self._next_look:
            return []
        self._next_look = now + self._silence_s / 20
        return [rank for rank in ranks if self._is_silent(rank, now, self._silence_s)]

    def _is_silent(self, rank: int, now: float, silence_s: float) -> bool:
        beat = self._rendezvous.store.get(f"{self._rendezvous.namespace}/alive/{rank}")
        last, since = self._last.get(rank, (None, now))
        if rank not in self._last or beat != last:
            self._last[rank] = (beat, now)
            return False
        return now - since >= silence_s


class Pause:
    """Polls eagerly at first, gently later."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._seconds = clock, 0.0005

    def take(self) -> None:
        """Until the next look."""
        self._clock.sleep(self._seconds)
        self._seconds = min(self._seconds * 1.5, 0.05)
