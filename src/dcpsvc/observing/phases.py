"""How long each phase of each save took on each rank, from the events; and which rank the others waited for."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

from dcpsvc.events import Point
from dcpsvc.lateness import OWN, slowest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from dcpsvc.events import Event
    from dcpsvc.lateness import Slowest

PHASES = {
    Point.STAGED: "stage",
    Point.PLAN_AGREED: "plan",
    Point.SHARD_WRITTEN: "write",
    Point.ACKED_LOCAL: "ack-local",
    Point.UPLOADED: "upload",
    Point.ACKED_REMOTE: "ack-remote",
    Point.COMMITTED: "commit",
}
"""The point that ends each phase; it began where the one before ended."""

_ENDS = {Point.COMMITTED: "committed", Point.SAVE_FAILED: "failed", Point.SAVE_SKIPPED: "skipped"}
_MAX_OPEN = 64
"""Saves that are followed at once; one whose end is never told is forgotten in the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveTimes:
    """One save on one rank.

    Attributes:
        step: Training step.
        attempt: Which try.
        rank: Global rank.
        began: When it was accepted, seconds since 1970.
        seconds: By phase; a phase that was not reached is absent.
        nbytes: Of this rank's shard; None if it was not written.
        outcome: ``committed``, ``failed`` or ``skipped``.
        detail: Why, if it was not committed.
        retries: Calls to stores that its process made again meanwhile, for whatever reason.
        waited: Seconds that training waited for it, by what for; some are told after its end.
    """

    step: int
    attempt: str
    rank: int
    began: float
    seconds: dict[str, float]
    nbytes: int | None = None
    outcome: str = "committed"
    detail: str = ""
    retries: int = 0
    waited: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def total_s(self) -> float:
        """From the call to the end."""
        return sum(self.seconds.values())

    @property
    def blocked_s(self) -> float:
        """What training waited for it, all in all."""
        return sum(self.waited.values())

    def to_json(self) -> dict[str, Any]:
        """One line of a log."""
        return asdict(self) | {"seconds": _rounded(self.seconds), "waited": _rounded(self.waited)}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """What :meth:`to_json` gave; raises TypeError, ValueError or KeyError for anything else."""
        return cls(
            step=int(said["step"]),
            attempt=str(said["attempt"]),
            rank=int(said["rank"]),
            began=float(said["began"]),
            seconds={str(name): float(value) for name, value in dict(said["seconds"]).items()},
            nbytes=None if said["nbytes"] is None else int(said["nbytes"]),
            outcome=str(said["outcome"]),
            detail=str(said["detail"]),
            retries=int(said["retries"]),
            waited={str(name): float(value) for name, value in dict(said["waited"]).items()},
        )


@dataclass(slots=True)
class _Open:
    began: float
    retried_before: int
    points: list[tuple[Point, float]] = field(default_factory=list[tuple[Point, float]])
    nbytes: int | None = None
    waited: dict[str, float] = field(default_factory=dict[str, float])

    def note(self, event: Event, now: float) -> None:
        """What an event says about the save."""
        if event.name is Point.TRAINING_WAITED:
            self.waited[event.phase] = self.waited.get(event.phase, 0.0) + (event.seconds or 0.0)
        if event.name in PHASES:
            self.points.append((event.name, now))
        if event.name is Point.SHARD_WRITTEN:
            self.nbytes = event.nbytes


class Tracker:
    """Follows the saves of one rank from event to event. The caller locks.

    Args:
        retries: How many calls to stores the process has made again so far.
    """

    def __init__(self, retries: Callable[[], int] = lambda: 0) -> None:
        self._retries = retries
        self._open: dict[tuple[int, str], _Open] = {}

    def take(self, event: Event, at: float, now: float) -> SaveTimes | None:
        """Take an event in; gives the save that it ends.

        Args:
            event: Of this rank.
            at: When, seconds since 1970.
            now: The same on a clock that never jumps.
        """
        if event.step is None or not event.attempt:
            return None
        key = (event.step, event.attempt)
        if event.name is Point.SAVE_ACCEPTED:
            self._begin(key, _Open(at, self._retries(), [(event.name, now)]))
        elif (save := self._open.get(key)) is not None:
            save.note(event, now)
            if event.name in _ENDS:
                del self._open[key]
                return self._ended(*key, save, event)
        return None

    def _begin(self, key: tuple[int, str], save: _Open) -> None:
        self._open[key] = save
        if len(self._open) > _MAX_OPEN:
            del self._open[next(iter(self._open))]

    def _ended(self, step: int, attempt: str, save: _Open, event: Event) -> SaveTimes:
        return SaveTimes(
            step=step,
            attempt=attempt,
            rank=event.rank,
            began=save.began,
            seconds=_seconds(save.points),
            nbytes=save.nbytes,
            outcome=_ENDS[event.name],
            detail="" if event.name is Point.COMMITTED else event.detail,
            retries=self._retries() - save.retried_before,
            waited=save.waited,
        )

    def follows(self, event: Event) -> bool:
        """Whether the event is about a save that has not ended."""
        return (event.step, event.attempt) in self._open

    def open_attempts(self) -> int:
        """How many saves are under way."""
        return len(self._open)


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in seconds.items()}


def _seconds(points: list[tuple[Point, float]]) -> dict[str, float]:
    return {PHASES[point]: max(0.0, now - before) for (_, before), (point, now) in pairwise(points)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """The rank that the others waited for at one save.

    Attributes:
        step: Training step.
        attempt: Which try.
        who: Which rank, where and how long.
    """

    step: int
    attempt: str
    who: Slowest

    def __str__(self) -> str:
        who = self.who
        took = f"rank {who.rank} took {who.seconds:.2f} s to {who.phase}"
        return f"step {self.step}: {took}, the median {who.median_s:.2f} s"


def stragglers(saves: Iterable[SaveTimes]) -> list[Straggler]:
    """The rank that each save waited for, where one stands out; ascending by step. Pure."""
    by_attempt: defaultdict[tuple[int, str], dict[str, dict[int, float]]] = defaultdict(
        lambda: {own: {} for own in OWN}
    )
    for save in saves:
        for phase in OWN:
            if phase in save.seconds:
                by_attempt[save.step, save.attempt][phase][save.rank] = save.seconds[phase]
    found = ((key, slowest(took)) for key, took in sorted(by_attempt.items()))
    return [Straggler(step=step, attempt=attempt, who=who) for (step, attempt), who in found if who is not None]
