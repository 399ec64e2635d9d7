"""What ranks can agree on, and how the coordinator leads them there.

Every rank's side, and the protocol in words: :mod:`~dcpsvc.ranks.proposals`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

    from dcpsvc.ranks.proposals import Proposals
    from dcpsvc.ranks.rendezvous import KeyValue

logger = logging.getLogger("dcpsvc")

SAVE, STOP, QUIT, ABORT = "save", "stop", "quit", "abort"
"""Save and go on; save and stop; stop without saving; the same, and what is in flight is abandoned."""

GO, VOID, NOTED, LATE = "go", "void", "noted", "late"


class Agreed(NamedTuple):
    """What all ranks will do, or have done: told by :attr:`~dcpsvc.ranks.proposals.Proposals.agreed`.

    Attributes:
        kind: ``save``, ``stop``, ``quit`` or ``abort``.
        step: At the first step that is not below this one.
        why: Who asked, and why; empty for the schedule.
        urgent: Somebody is being preempted: the time that is left counts.
    """

    kind: str
    step: int
    why: str = ""
    urgent: bool = False

    def __str__(self) -> str:
        return f"{self.kind} at step {self.step}{': ' if self.why else ''}{self.why}"


@dataclass(frozen=True, slots=True)
class Proposal:
    """One proposal as it stands on the store; ``served`` is the first place of the queue it does not serve."""

    number: int
    kind: str
    step: int
    why: str
    urgent: bool
    served: int

    def agreed(self) -> Agreed:
        """What is told of it once it stands."""
        return Agreed(self.kind, self.step, self.why, self.urgent)


def together(kinds: Collection[str]) -> str | None:
    """The one thing to do that serves all: who wants a save or an end gets it, but for an abort."""
    if ABORT in kinds:
        return ABORT
    if STOP in kinds or {SAVE, QUIT} <= set(kinds):
        return STOP
    return next(iter(kinds), None)


@dataclass(slots=True)
class Coordinator:
    """Proposes and settles, one proposal after the other; on rank 0's watcher thread."""

    side: Proposals
    _asks: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    _read: int = 0
    _number: int = 0
    _open: Proposal | None = None
    _unheard: list[int] = field(default_factory=list[int])
    _voids: int = 0
    _farthest: int = -1
    _agreed_step: int = -1
    _stopping: bool = False

    @property
    def _store(self) -> KeyValue:
        return self.side.rendezvous.store

    def look(self) -> None:
        """Settle what is proposed; read what is asked, and propose it."""
        self._settle()
        if self._open is None and not self._stopping:
            self._read_asks()
            self._propose()
            self._settle()  # one rank alone has agreed already

    def _read_asks(self) -> None:
        while (text := self._store.get(self.side.key("ask", self._read))) is not None:
            self._asks[self._read] = json.loads(text)
            self._read += 1

    def _propose(self) -> None:
        kind = together({ask["kind"] for ask in self._asks.values()})
        passed = self.side.step >= self._agreed_step
        if kind is None and passed and self.side.step >= 0 and self.side.due():
            kind = SAVE
        if kind is None or (kind == SAVE and not passed):
            return
        step = max(self.side.step, self._farthest) + self._ahead()
        if kind == QUIT:
            step = max(step, self._agreed_step)  # the agreed save comes first
        why = "; ".join(dict.fromkeys(ask["why"] for ask in self._asks.values() if ask["why"]))
        urgent = any(ask["urgent"] for ask in self._asks.values())
        what = json.dumps(asdict(Proposal(self._number, kind, step, why, urgent, self._read)))
        # Compare-and-set: after an error nobody knows whether the first one stands and is noted already.
        self._open = Proposal(**json.loads(self._store.compare_set(self.side.key(self._number, "what"), what)))
        self._unheard = list(range(self.side.rendezvous.world_size))[::-1]
        self.side.note()

    def _ahead(self) -> int:
        """Steps until all ranks can have confirmed and heard; one where a step takes longer than that.

        A proposal that came too near the end of a step costs no more than one made for the next, so one void alone
        is no reason to go further than time demands.
        """
        lead_s = 3 * self.side.poll_s if self.side.rendezvous.world_size > 1 else 0.0
        return max(1 << max(0, self._voids - 1), self.side.steps_in(lead_s * (1 << self._voids)))

    def _settle(self) -> None:
        """Say ``go`` once all have noted it, ``void`` once it is too late."""
        if (proposal := self._open) is None:
            return
        late = False
        while self._unheard and not late:
            words = (self._store.get(self.side.key("seen", self._unheard[-1])) or "-1").split()
            if int(words[0]) != proposal.number:
                break
            self._unheard.pop()
            late = words[1] == LATE
            self._farthest = max(self._farthest, int(words[2]))
        if self._unheard and not late and self.side.step < proposal.step:
            return
        word = VOID if late or self._unheard else GO
        stands = self._store.compare_set(self.side.key(proposal.number, "verdict"), word)
        self._open, self._number = None, proposal.number + 1
        self._close(proposal, went=stands == GO)

    def _close(self, proposal: Proposal, *, went: bool) -> None:
        if not went:
            self._voids = min(self._voids + 1, 10)
            return
        self._voids = max(self._voids - 1, 0)
        self._agreed_step = max(self._agreed_step, proposal.step)
        self._asks = {place: ask for place, ask in self._asks.items() if place >= proposal.served}
        if proposal.kind != SAVE:
            self._stopping = True
            logger.info("all ranks %s", proposal.agreed())
