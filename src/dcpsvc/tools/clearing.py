"""``dcpsvc gc``: removing what is not to stay, from a run root that no job owns, in the way that jobs do it.

Claims the run root first, so a job that lives is never robbed: one on this host is refused, one elsewhere must be
spoken for, and one that starts meanwhile takes the root over and ends this. Killed at any moment, it is carried on by
the next call, or by the next job.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcpsvc import fence, sidefiles
from dcpsvc.errors import RunBusyError
from dcpsvc.stages import retain
from dcpsvc.stages.retain import Removal
from dcpsvc.tools import clearplan, leftovers, owning

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.format.keys import Epoch
    from dcpsvc.storage.base import Store
    from dcpsvc.tools.clearplan import Doomed, Leftovers, Loose
    from dcpsvc.tools.clearrules import Rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleared:
    """What was removed.

    Attributes:
        removed: With the reasons.
        held: Checkpoints that somebody has begun to use meanwhile: they stay.
        unfinished: Uploads of dead writers that were ended.
        nbytes: Freed.
    """

    removed: tuple[Doomed | Loose, ...]
    held: tuple[Doomed, ...]
    unfinished: int
    nbytes: int

    def document(self) -> dict[str, Any]:
        """As JSON-like values."""
        return {
            "removed": [one.document() for one in self.removed],
            "held": [one.document() for one in self.held],
            "unfinished": self.unfinished,
            "nbytes": self.nbytes,
        }


class Pace:
    """Counts what is deleted, and keeps to a rate; see :class:`retain.Pace`.

    Args:
        progress: Called with the bytes of each object.
        per_s: Objects a second; None: as fast as the store answers.
        clock: Seconds that only grow.
        pause: Waits so many seconds.
    """

    def __init__(
        self,
        progress: Callable[[int], None],
        per_s: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.nbytes = 0
        self._progress, self._per_s, self._clock, self._pause = progress, per_s, clock, pause
        self._next = clock()

    def more(self, nbytes: int = 0) -> bool:
        """There is no end to the time; waits for the turn."""
        if self._per_s is not None:
            now_s = self._clock()
            if self._next > now_s:
                self._pause(self._next - now_s)
            self._next = max(self._next, now_s) + 1.0 / self._per_s
        self.nbytes += nbytes
        self._progress(nbytes)
        return True


def clear(store: Store, run_id: str, rules: Rules, pace: Pace, *, take_over: bool = False) -> Cleared:
    """Remove what :func:`leftovers.find` finds once the run root is claimed. Claims nothing if nothing is to go.

    Args:
        store: The run root.
        run_id: Of the run.
        rules: What may go.
        pace: Of the deletions.
        take_over: See :func:`owning.check_idle`.

    Raises:
        RunBusyError: A job lives, or may live, or has taken the run root over meanwhile.
        RemovalRefusedError: What was asked for must not go.
        StoreError: The run root does not answer; what is left goes with the next call.
    """
    if leftovers.find(store, rules, time.time()).is_empty:
        return Cleared(removed=(), held=(), unfinished=0, nbytes=0)
    owning.check_idle(store, run_id, take_over=take_over)
    return _Clearing(store, owning.claim(store), pace).run(leftovers.find(store, rules, time.time()))


class _Clearing:
    def __init__(self, store: Store, epoch: Epoch, pace: Pace) -> None:
        self._store, self._epoch, self._pace = store, epoch, pace
        self._removed: list[Doomed | Loose] = []
        self._held: list[Doomed] = []

    def run(self, found: Leftovers) -> Cleared:
        for one in found.doomed:
            self._remove(one)
        self._check_owned()
        held = {one.attempt for one in self._held}
        for file in found.loose:
            if not held & found.users.get(file.key, frozenset()):
                self._pace.more(file.nbytes)
                self._store.delete(file.key)
                self._removed.append(file)
        unfinished = 0
        if found.unfinished:
            unfinished = self._store.remove_unfinished(found.limit_s)
        return Cleared(
            removed=tuple(self._removed), held=tuple(self._held), unfinished=unfinished, nbytes=self._pace.nbytes
        )

    def _remove(self, one: Doomed) -> None:
        def held() -> bool:  # a pin beside what is no checkpoint holds nothing
            return one.kind != clearplan.ATTEMPT and sidefiles.is_pinned(self._store, one.attempt, time.time())

        outcome = retain.remove(self._store, one.attempt, self._is_owner, held=held, pace=self._pace)
        if outcome is Removal.NOT_OURS:
            self._check_owned()
        if outcome is Removal.HELD:
            self._held.append(one)
        else:
            self._removed.append(one)

    def _is_owner(self) -> bool:
        return not fence.successor(self._store, self._epoch)

    def _check_owned(self) -> None:
        if theirs := fence.successor(self._store, self._epoch):
            raise RunBusyError(self._store.url, f"{theirs} has taken it over; it goes on with what was begun")
