"""Arrive first, decide once: a gather and a broadcast over a key-value store, with a deadline.

Each rank posts one message under ``<where>/<rank>``. The coordinator (rank 0) waits for all, decides, and the
decision is written by compare-and-set under ``<where>/verdict``: the first writer wins and every rank acts on
what is written there, so there is one decision even when somebody gives up at the same moment. A rank
whose deadline passes does not leave: it proposes "these are missing" by the same compare-and-set.

A message (:mod:`dcpsvc.ranks.messages`) can be a failure; it is a value, not an exception, and decides the meeting at
once: but a LostPeerError only says that somebody else has stopped. Who that is shows in who does not come.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dcpsvc.deadline import SystemClock
from dcpsvc.errors import RankFailure
from dcpsvc.ranks import messages
from dcpsvc.ranks.silence import Pause, SignsOfLife

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dcpsvc.deadline import Clock


_SUSPICION = 1.5
"""After a LostPeerError somebody is dead or held up: how many silences long the others are waited for."""


class KeyValue(Protocol):
    """What we need of a c10d store. Every call is short and may be made from any thread."""

    def set(self, key: str, value: str) -> None:
        """Write a key."""
        ...

    def get(self, key: str) -> str | None:
        """Read a key; None where nobody has written it. Never waits."""
        ...

    def compare_set(self, key: str, desired: str) -> str:
        """Write a key nobody has written; say what stands there now."""
        ...

    def delete(self, key: str) -> None:
        """Forget a key."""
        ...


class DisagreementError(Exception):
    """A meeting that did not agree: the same content on every rank. Stages turn it into what the user sees."""

    def __init__(
        self, phase: str, failures: Sequence[RankFailure], missing: Sequence[int], world_size: int, waited_s: float
    ) -> None:
        super().__init__(phase, failures, missing, world_size, waited_s)
        self.phase, self.failures, self.missing = phase, tuple(failures), tuple(missing)
        self.present = tuple(rank for rank in range(world_size) if rank not in set(missing))
        self.waited_s = waited_s


class RefusalError(Exception):
    """Raised by a decide function: what the ranks said cannot stand."""

    def __init__(self, failures: Sequence[RankFailure]) -> None:
        super().__init__(failures)
        self.failures = tuple(failures)


@dataclass(frozen=True, slots=True)
class Meeting:
    """How long to wait, and how to notice the dead.

    Attributes:
        timeout_s: A rank that has not arrived by then is missing.
        silence_s: A rank that has not arrived and gave no sign of life for this long is missing;
            None: only the timeout counts.
    """

    timeout_s: float
    silence_s: float | None = None


@dataclass(slots=True)
class Rendezvous:
    """One rank's side of every meeting of a run. ``meet`` may be called from one thread at a time per place.

    Attributes:
        rank: Global rank; 0 coordinates.
        world_size: How many must arrive.
        store: Shared by all ranks.
        clock: For deadlines.
        namespace: Prefix of every key, new for every run of the job.
    """

    rank: int
    world_size: int
    store: KeyValue
    clock: Clock = field(default_factory=SystemClock)
    namespace: str = ""
    _left: deque[str] = field(default_factory=deque[str])

    def meet(
        self,
        where: str,
        message: Any,
        decide: Callable[[list[Any]], Any],
        meeting: Meeting,
    ) -> Any:
        """Tell the others ``message``, get the decision; every rank gets the same one.

        Args:
            where: Name of the meeting, unique in the run: it bears the attempt and the phase.
            message: JSON-like, or a :class:`RankFailure`: this rank cannot go on.
            decide: Run by the coordinator on all messages in rank order. JSON-like result. May raise
                :class:`RefusalError`.
            meeting: Deadlines.

        Raises:
            DisagreementError: Ranks failed, are missing, or were refused.
            RuntimeError: The store does not answer. The others hear of it before the next sign of life.
        """
        try:
            return self._meet(where, message, decide, meeting)
        except RuntimeError:
            self._left.append(f"{self.namespace}/{where}")
            raise

    def _meet(self, where: str, message: Any, decide: Callable[[list[Any]], Any], meeting: Meeting) -> Any:
        began = self.clock.now()
        place = f"{self.namespace}/{where}"
        self.store.set(f"{place}/{self.rank}", messages.encode(message))
        if self.rank == 0:
            self.store.compare_set(f"{place}/verdict", self._coordinate(place, decide, meeting))
        return self._read_verdict(place, where, meeting, began)

    def follow(self, where: str, meeting: Meeting) -> None:
        """The coordinator says that it is here; the others wait until it does, falls silent, or the time is over.

        Raises:
            RuntimeError: The store does not answer.
        """
        key = f"{self.namespace}/{where}/verdict"
        if self.rank == 0:
            self.store.set(key, "here")
            return
        life, pause = SignsOfLife(self, meeting.silence_s), Pause(self.clock)
        ends = self.clock.now() + meeting.timeout_s
        while self.store.get(key) is None and self.clock.now() < ends and not life.silent([0]):
            pause.take()

    def was_missed(self, where: str) -> bool:
        """Whether the others waited for this rank at a meeting in vain, and have left."""
        text = self.store.get(f"{self.namespace}/{where}/verdict")
        return text is not None and self.rank in json.loads(text).get("missing", ())

    def forget(self, where: str) -> None:
        """Free a meeting's keys on the store; the coordinator calls it when every rank has moved on."""
        for name in (*range(self.world_size), "verdict"):
            self.store.delete(f"{self.namespace}/{where}/{name}")

    def beat(self, count: int) -> None:
        """Give a sign of life; but first say which meetings were left because the store did not answer.

        Whoever sees this rank alive would wait there for it, and it will not come.
        """
        while self._left:
            self.store.compare_set(f"{self._left[0]}/verdict", messages.no([], [self.rank]))
            self._left.popleft()
        self.store.set(f"{self.namespace}/alive/{self.rank}", str(count))

    def _coordinate(self, place: str, decide: Callable[[list[Any]], Any], meeting: Meeting) -> str:
        brought, missing = self._collect(place, meeting)
        failures = messages.failures(brought)
        if not failures and not missing:
            try:
                return json.dumps({"agreed": decide(brought)})
            except RefusalError as refusal:
                failures = list(refusal.failures)
            except Exception as err:  # noqa: BLE001 - whatever happened here, the others must hear of it
                failures = [RankFailure(0, "decide", type(err).__name__, str(err))]
        return messages.no(failures, missing)

    def _collect(self, place: str, meeting: Meeting) -> tuple[list[Any], list[int]]:
        """What the ranks brought, in their order, as far as it was waited for; and who is missing."""
        brought: dict[int, Any] = {}
        life = SignsOfLife(self, meeting.silence_s)
        ends = self.clock.now() + meeting.timeout_s
        pause = Pause(self.clock)
        while absent := [rank for rank in range(self.world_size) if rank not in brought]:
            arrived = self._arrivals(place, absent)
            brought |= arrived
            if any(messages.decides(message) for message in arrived.values()):
                break
            if any(isinstance(message, RankFailure) for message in arrived.values()) and meeting.silence_s:
                ends = min(ends, self.clock.now() + _SUSPICION * meeting.silence_s)
            absent = [rank for rank in absent if rank not in arrived]
            if dead := life.silent(absent):
                return _in_order(brought), dead
            gave_up_first = absent and not arrived and self.store.get(f"{place}/verdict") is not None
            if absent and (self.clock.now() >= ends or gave_up_first):  # what stands there counts
                return _in_order(brought), absent
            if absent and not arrived:
                pause.take()
        return _in_order(brought), []

    def _arrivals(self, place: str, ranks: list[int]) -> dict[int, Any]:
        texts = ((rank, self.store.get(f"{place}/{rank}")) for rank in ranks)
        return {rank: messages.decode(text) for rank, text in texts if text is not None}

    def _read_verdict(self, place: str, where: str, meeting: Meeting, began: float) -> Any:
        life = SignsOfLife(self, meeting.silence_s)
        ends = self.clock.now() + meeting.timeout_s
        pause = Pause(self.clock)
        key = f"{place}/verdict"
        while (text := self.store.get(key)) is None:
            if self.clock.now() >= ends or life.silent([0]):
                text = self.store.compare_set(key, self._without_coordinator(place))
                break
            pause.take()
        verdict = json.loads(text)
        if "agreed" in verdict:
            return verdict["agreed"]
        failures = [RankFailure(*failure) for failure in verdict["failures"]]
        waited_s = self.clock.now() - began
        raise DisagreementError(where.rsplit("/", 1)[-1], failures, verdict["missing"], self.world_size, waited_s)

    def _without_coordinator(self, place: str) -> str:
        """Who has not arrived; a coordinator that arrived and fell silent is missing too."""
        present = self._arrivals(place, list(range(self.world_size)))
        failures = messages.failures(present.values())
        return messages.no(failures, [rank for rank in range(self.world_size) if rank not in present] or [0])


def _in_order(brought: dict[int, Any]) -> list[Any]:
    return [brought[rank] for rank in sorted(brought)]
