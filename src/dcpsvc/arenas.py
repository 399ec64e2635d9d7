"""This rank's arenas: how many there may be, which one a save gets, and the first one made in the background."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc import linux
from dcpsvc.arena import Arena

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from dcpsvc.format.shardfile import Placement

logger = logging.getLogger("dcpsvc")

_PATIENCE_S = 120.0
"""Longest wait for memory that is being touched: some seconds at the rate of a slow virtual machine."""


@dataclass(frozen=True, slots=True)
class Tight:
    """There is no arena: this much memory is all there is."""

    spare_nbytes: int


class Arenas:
    """One arena for each save that is not on disk yet. One thread takes.

    Args:
        budget_nbytes: For all of them together; None asks ``free_nbytes``.
        at_most: How many there may be: a disk that hangs keeps the arena it reads.
        free_nbytes: What could still be allocated now; None where nobody knows.

    Attributes:
        device: The accelerator from which is copied into them; None: there is none.
    """

    def __init__(self, budget_nbytes: int | None, at_most: int, free_nbytes: Callable[[], int | None]) -> None:
        self._budget_nbytes, self._at_most, self._free_nbytes = budget_nbytes, at_most, free_nbytes
        self._arenas: list[Arena] = []
        self._preparing: list[threading.Thread] = []
        self._closed = threading.Event()
        self._has_warned = False
        self.device: torch.device | None = None

    @property
    def nbytes(self) -> int:
        """Held by all of them."""
        return sum(arena.nbytes for arena in self._arenas)

    def prepare(self, work: Callable[[], None]) -> None:
        """Do something on a thread of its own, such as :meth:`make_ready`; the next :meth:`take` waits for it."""
        before = [thread for thread in self._preparing if thread.is_alive()]
        after = threading.Thread(target=_after, args=(before, work), name="dcpsvc-prepare", daemon=True)
        self._preparing = [*before, after]
        after.start()

    def settle(self) -> None:
        """Wait for what was begun by :meth:`prepare`.

        Raises:
            TimeoutError: The system does not give the memory, and does not refuse it either.
        """
        if not _have_ended(self._preparing):
            raise TimeoutError(f"memory for staging is not there after {_PATIENCE_S} s")
        self._preparing = []

    def close(self) -> None:
        """Nobody takes one any more: what is being prepared is called off. Those that are lent stay as they are."""
        self._closed.set()
        with contextlib.suppress(TimeoutError):
            self.settle()

    def take(self, nbytes: int) -> Arena | Tight:
        """A free arena that holds ``nbytes``: one that was used before or prepared, or a new one.

        Raises:
            TimeoutError: The saves before are still being written, all that may be.
        """
        self.settle()
        arena = self._find(nbytes)
        self._pin(arena)
        return arena

    def make_ready(self, placement: Placement) -> None:
        """Have a free arena for such a shard, if there is memory; for :meth:`prepare`.

        Raises:
            TimeoutError: There are as many as there may be, none of them free.
        """
        arena = self._find(placement.tensors_end)
        if isinstance(arena, Arena) and self._wanted():
            arena.cut(placement)
            self._pin(arena)

    def _find(self, nbytes: int) -> Arena | Tight:
        free = [arena for arena in self._arenas if arena.free]
        if fitting := [arena for arena in free if arena.nbytes >= nbytes]:
            return min(fitting, key=lambda arena: arena.nbytes)
        for arena in free:
            if arena.capacity_nbytes >= nbytes and _fits(nbytes - arena.nbytes, self._spare_nbytes()):
                with contextlib.suppress(MemoryError):
                    arena.reserve(nbytes, self._wanted)
                    return arena
        for arena in free:
            self._arenas.remove(arena)
            arena.release()
        if len(self._arenas) >= self._at_most:
            raise TimeoutError(f"the local disk has not taken the {len(self._arenas)} shards before this one")
        return self._make(nbytes)

    def _make(self, nbytes: int) -> Arena | Tight:
        spare = self._spare_nbytes()
        if spare is not None and not _fits(nbytes, spare):
            return Tight(max(spare, 0))
        arena = Arena()
        try:
            arena.reserve(nbytes, self._wanted)
        except MemoryError:
            arena.release()
            return Tight(0)
        self._arenas.append(arena)
        return arena

    def _pin(self, arena: Arena | Tight) -> None:
        """Also one that was made, or has grown, since."""
        if self.device is None or isinstance(arena, Tight) or arena.pin(self.device) or self._has_warned:
            return
        self._has_warned = True
        logger.warning(
            "memory for staging cannot be pinned for %s: copies from it are slower, and save() waits for them",
            self.device,
        )

    def _spare_nbytes(self) -> int | None:
        return self._free_nbytes() if self._budget_nbytes is None else self._budget_nbytes - self.nbytes

    def _wanted(self) -> bool:
        return not self._closed.is_set()


def _fits(nbytes: int, spare_nbytes: int | None) -> bool:
    return spare_nbytes is None or nbytes <= spare_nbytes


def _after(before: list[threading.Thread], work: Callable[[], None]) -> None:
    """In the background, where training has the first right to the processor."""
    linux.yield_to_training()
    if _have_ended(before):
        work()
    else:  # take() waits for those that hang, and says so
        logger.debug("nothing more is prepared: what was begun before is not ready after %s s", _PATIENCE_S)


def _have_ended(threads: list[threading.Thread]) -> bool:
    """Wait for all of them; False if one still runs when the patience is over."""
    ends = time.monotonic() + _PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)
