"""How ranks agree to save at a step that no schedule names, without any rank waiting inside a step.

A watcher thread on the coordinator proposes a step ahead of everybody. Watchers of the other ranks note it and
confirm. Once all have, the coordinator writes ``go``; a rank that reaches the step writes ``void`` unless ``go`` is
there, by compare-and-set. The first word stands for all, at the price of one store call at that step.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.ranks.rendezvous import Rendezvous

SAVE, STOP = "save", "stop"
POLL_S = 0.1


@dataclass(slots=True)
class Proposals:
    """One rank's side.

    Attributes:
        rendezvous: The ranks.
        due: Asked on the coordinator at every poll: whether a save is wanted now.
    """

    rendezvous: Rendezvous
    due: Callable[[], bool]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _step: int = -1
    _noted: dict[int, tuple[int, str]] = field(default_factory=dict[int, tuple[int, str]])
    _next: int = 0
    _open: tuple[int, str, int] | None = None
    _lead_s: float = 4 * POLL_S
    _seen: tuple[float, int] | None = None
    _steps_per_s: float = 1.0
    _agreed: int = -1
    _stopping: bool = False
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._thread = threading.Thread(target=self._watch, name="dcpsvc-watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watcher; bounded."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def ask_to_stop(self) -> None:
        """Want the job to save and stop soon. Any rank, any thread."""
        self.rendezvous.store.set(self._key("ask", STOP), "1")

    def at(self, step: int) -> str | None:
        """What all ranks do at ``step``: ``save``, ``stop``, or None. Training thread; never waits for a peer.

        Steps may be skipped, as long as all ranks visit the same ones.
        """
        with self._lock:
            self._step = step
            noted = [self._noted.pop(noted) for noted in sorted(self._noted) if noted <= step]
        for number, kind in noted:
            if self._stands(number):
                return kind
        return None

    def _stands(self, number: int) -> bool:
        try:
            return self.rendezvous.store.compare_set(self._key(number, "verdict"), "void") == "go"
        except RuntimeError as err:  # the store is gone, and with it the other ranks: not a matter for this step
            logging.getLogger("dcpsvc").warning("an agreed save is left out: %s", err)
            return False

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_S):
            try:
                self.look()
            except RuntimeError as err:  # it may come back; if it does not, the job is over
                logging.getLogger("dcpsvc").debug("no look at the proposals: %s", err)

    def look(self) -> None:
        """One look at the store: note what is proposed; on the coordinator, propose and settle. Watcher thread."""
        self._note_proposal()
        if self.rendezvous.rank == 0:
            self._coordinate()

    def _note_proposal(self) -> None:
        text = self.rendezvous.store.get(self._key(self._next, "what"))
        if text is None:
            return
        what = json.loads(text)
        with self._lock:
            in_time = self._step < what["step"]
            if in_time:
                self._noted[what["step"]] = (self._next, what["kind"])
        word = "noted" if in_time else "late"
        self.rendezvous.store.set(self._key(self._next, "seen", self.rendezvous.rank), word)
        self._next += 1

    def _coordinate(self) -> None:
        self._measure()
        if self._open is not None:
            self._settle(*self._open)
        elif not self._stopping and self._step > self._agreed:
            if self.rendezvous.store.get(self._key("ask", STOP)) is not None:
                self._propose(STOP)
            elif self.due():
                self._propose(SAVE)

    def _propose(self, kind: str) -> None:
        ahead = max(2, math.ceil(self._steps_per_s * self._lead_s))
        number, step = self._next, self._step + ahead
        self.rendezvous.store.set(self._key(number, "what"), json.dumps({"step": step, "kind": kind}))
        self._open = (number, kind, step)

    def _settle(self, number: int, kind: str, step: int) -> None:
        """Say ``go`` once all have noted it, ``void`` once it is too late; a longer lead next time."""
        ranks = range(self.rendezvous.world_size)
        words = [self.rendezvous.store.get(self._key(number, "seen", rank)) for rank in ranks]
        if all(word == "noted" for word in words):
            word = "go"
        elif "late" in words or self._step >= step:
            word = "void"
        else:
            return
        stands = self.rendezvous.store.compare_set(self._key(number, "verdict"), word)
        self._open = None
        if stands == "go":
            self._agreed = step  # nothing more is proposed until every rank has passed it
            self._stopping = self._stopping or kind == STOP
        else:
            self._lead_s *= 2

    def _measure(self) -> None:
        now, step = self.rendezvous.clock.now(), self._step
        if step < 0:
            return
        if self._seen is not None and step > self._seen[1] and now > self._seen[0]:
            self._steps_per_s = (step - self._seen[1]) / (now - self._seen[0])
        if self._seen is None or step != self._seen[1]:
            self._seen = (now, step)

    def _key(self, *parts: object) -> str:
        return "/".join([self.rendezvous.namespace, "proposals", *map(str, parts)])
