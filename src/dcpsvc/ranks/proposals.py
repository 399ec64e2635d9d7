"""How ranks agree to save or stop at a step that no schedule names, without any rank waiting inside a step.

A watcher thread on every rank looks at the ranks' store a few times a second. What a rank asks for stands in a queue
there. The coordinator's watcher proposes a step for it, a little ahead of everybody; the watchers of all ranks note it
and confirm. Once all have, the coordinator writes ``go``; a rank that reaches the step writes ``void`` unless ``go`` is
there, by compare-and-set. The first word stands for all. A void proposal is made anew, further ahead.

Each proposal is done at the first step of all that is not below its own, so a job may count by tens.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from dcpsvc.ranks.agreement import (
    ABORT,
    GO,
    LATE,
    NOTED,
    QUIT,
    SAVE,
    STOP,
    VOID,
    Agreed,
    Coordinator,
    Proposal,
    together,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.ranks.rendezvous import Rendezvous

__all__ = ["ABORT", "QUIT", "SAVE", "STOP", "Agreed", "Proposals", "together"]

logger = logging.getLogger("dcpsvc")

POLL_S = 0.1
STEP_PATIENCE_S = 5.0
"""What a training step may lose when the ranks' store falls silent."""
_LOOKS_PER_S = 20_000
"""Of all ranks together: what one store answers beside its other work. Very large jobs look less often."""


@dataclass(slots=True)
class _Pace:
    """The step a rank is at, and how fast it went lately: the fastest of its last steps counts."""

    step: int = -1
    _at_s: float = 0.0
    _per_s: tuple[float, ...] = ()

    def note(self, now_s: float, step: int) -> None:
        if self.step >= 0 and now_s > self._at_s:
            self._per_s = (*self._per_s[-7:], (step - self.step) / (now_s - self._at_s))
        self.step, self._at_s = step, now_s

    def steps_in(self, seconds: float) -> int:
        return math.ceil(max(self._per_s, default=0.0) * seconds)


@dataclass(slots=True)
class Proposals:
    """One rank's side.

    Attributes:
        rendezvous: The ranks.
        due: Asked on the coordinator at every look: whether a save is wanted now.
        wanted: Asked on every rank at every look: a kind this rank wants urgently, or None.
        because: Asked when ``wanted`` named one: why, for people on all ranks.
    """

    rendezvous: Rendezvous
    due: Callable[[], bool]
    wanted: Callable[[], str | None] = lambda: None
    because: Callable[[], str] = lambda: ""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pace: _Pace = field(default_factory=_Pace)
    _asked: dict[tuple[str, bool], str] = field(default_factory=dict[tuple[str, bool], str])
    _asked_once: set[tuple[str, bool]] = field(default_factory=set[tuple[str, bool]])
    _noted: dict[int, Proposal] = field(default_factory=dict[int, Proposal])
    _words: dict[int, str] = field(default_factory=dict[int, str])
    _next: int = 0
    _served: int = 0
    _agreed: Agreed | None = None
    _coordinator: Coordinator | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)
    _wake: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        if self.rendezvous.rank == 0:
            self._coordinator = Coordinator(self)

    def start(self) -> None:
        """Begin to watch."""
        self._thread = threading.Thread(target=self._watch, name="dcpsvc-watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watcher; bounded."""
        self._stopped.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def ask(self, kind: str, why: str = "", *, urgent: bool = False) -> None:
        """Want ``kind`` soon. Any rank, any thread, any number of times; not in a signal handler.

        Returns at once: the watcher carries it to the store, as often as it takes. Asks of one kind are one until all
        agree; after that, a further save is a new one, and a further stop is nothing.
        """
        with self._lock:
            if (kind, urgent) not in self._asked_once:
                self._asked.setdefault((kind, urgent), why)
            if kind != SAVE:
                self._asked_once.add((kind, urgent))
        self._wake.set()

    @property
    def agreed(self) -> Agreed | None:
        """What this rank knows to be agreed and has not passed; a stop is told for good. Any thread."""
        with self._lock:
            return self._agreed

    @property
    def step(self) -> int:
        """The last step this rank came to; -1 before the first."""
        return self._pace.step

    def steps_in(self, seconds: float) -> int:
        """How many steps this rank makes in that time, rounded up, going by its last few."""
        return self._pace.steps_in(seconds)

    @property
    def poll_s(self) -> float:
        """Time between two looks."""
        return max(POLL_S, self.rendezvous.world_size / _LOOKS_PER_S)

    def at(self, step: int) -> str | None:
        """What all ranks do at ``step``: a kind, or None. Training thread; never waits for a peer.

        Calls the store only where the watcher has not yet heard what was decided for this very step.
        """
        with self._lock:
            self._pace.note(self.rendezvous.clock.now(), step)
            reached = [proposal for proposal in self._noted.values() if proposal.step <= step]
        return together({proposal.kind for proposal in reached if self._stands(proposal)})

    def _stands(self, proposal: Proposal) -> bool:
        word = self._words.get(proposal.number)
        if word is None:
            try:
                word = self._ask_the_store(proposal)
            except (RuntimeError, TimeoutError) as err:
                logger.warning("what the ranks agreed on is not known, going on: %s", err)
                if proposal.kind != SAVE:  # the other ranks may have stopped: asked again at the next step
                    return False
                word = VOID
                self._served = proposal.served  # if it was "go", who asks from now on is not among those served
        self._hear(proposal, word)
        with self._lock:
            del self._noted[proposal.number], self._words[proposal.number]
            if self._agreed is not None and self._agreed.kind == SAVE and self._agreed.step <= proposal.step:
                self._agreed = None
        return word == GO

    def _ask_the_store(self, proposal: Proposal) -> str:
        key = self.key(proposal.number, "verdict")
        ask = partial(self.rendezvous.store.compare_set, key, VOID)
        return self.rendezvous.clock.bounded(ask, STEP_PATIENCE_S, f"asking the ranks' store for {key}")

    def _hear(self, proposal: Proposal, word: str) -> None:
        with self._lock:
            if proposal.number not in self._noted:
                return  # the training thread has asked for itself, and passed it
            self._words[proposal.number] = word
            if word != GO:
                return
            self._served = max(self._served, proposal.served)
            if self._agreed is None or proposal.kind != SAVE:
                self._agreed = proposal.agreed()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            self._wake.wait(self.poll_s)
            self._wake.clear()
            try:
                if not self._stopped.is_set():
                    self.look()
            except Exception as err:  # noqa: BLE001 - the store may come back; a rank without a watcher voids everything
                logger.debug("no look at the proposals: %s", err)

    def look(self) -> None:
        """One look at the store: note, hear, ask; on the coordinator, propose and settle. Watcher thread."""
        while self.note():
            pass  # a rank that was held up catches up
        self._hear_verdicts()
        if (kind := self.wanted()) is not None:
            self.ask(kind, self.because(), urgent=True)
        self._send()
        if self._coordinator is not None:
            self._coordinator.look()

    def note(self) -> bool:
        """Confirm the next proposal, if there is one: in time, or too late. Watcher thread."""
        text = self.rendezvous.store.get(self.key(self._next, "what"))
        if text is None:
            return False
        proposal = Proposal(**json.loads(text))
        with self._lock:
            step = self.step
            in_time = step < proposal.step
            if in_time:
                self._noted[proposal.number] = proposal
        word = NOTED if in_time else LATE
        self.rendezvous.store.set(self.key("seen", self.rendezvous.rank), f"{proposal.number} {word} {step}")
        self._next += 1
        return True

    def _hear_verdicts(self) -> None:
        with self._lock:
            unheard = [proposal for number, proposal in self._noted.items() if number not in self._words]
        for proposal in unheard:
            if (word := self.rendezvous.store.get(self.key(proposal.number, "verdict"))) is not None:
                self._hear(proposal, word)

    def _send(self) -> None:
        """Put what was asked for into the queue; what the store does not take now is sent at the next look."""
        with self._lock:
            asked = dict(self._asked)
        for (kind, urgent), why in asked.items():
            mine = json.dumps({"kind": kind, "why": why, "urgent": urgent})
            for place in itertools.count(self._served):
                ask = json.loads(self.rendezvous.store.compare_set(self.key("ask", place), mine))
                if ask["kind"] == kind and ask["urgent"] >= urgent:
                    break  # mine, or somebody else's that is not served yet
            with self._lock:
                del self._asked[kind, urgent]

    def key(self, *parts: object) -> str:
        """Where something stands on the store."""
        return "/".join([self.rendezvous.namespace, "proposals", *map(str, parts)])
