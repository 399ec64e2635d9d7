"""This process's place among the ranks of a job, and its connections to them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch.distributed as dist

from dcpsvc.ranks.c10d import C10dStore, SoloStore, group_for_dcp
from dcpsvc.ranks.exchange import Exchange
from dcpsvc.ranks.rendezvous import Meeting, Rendezvous

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    import torch

    from dcpsvc.ranks.rendezvous import KeyValue

logger = logging.getLogger("dcpsvc")

_ordinals = itertools.count()
_BEATS_PER_TIMEOUT = 6


class Gathering(Protocol):
    """A group of all ranks for collectives of our own; see :class:`~dcpsvc.ranks.exchange.Exchange`."""

    @property
    def generation(self) -> int:
        """Which group this is."""
        ...

    @property
    def poisoned(self) -> bool:
        """Whether an operation timed out in it."""
        ...

    def renew(self, generation: int) -> None:
        """Be in the given generation."""
        ...

    def all_gather(self, data: bytes) -> list[bytes]:
        """What every rank gave, in rank order."""
        ...

    def gather(self, data: bytearray, sizes: Sequence[int]) -> list[bytearray]:
        """On rank 0 what every rank gave, in rank order."""
        ...

    def broadcast(self, data: torch.Tensor) -> torch.Tensor:
        """What rank 0 gave."""
        ...

    def close(self) -> None:
        """Leave."""
        ...


@dataclass(slots=True)
class Job:
    """One rank's connections: meetings on the store, a gloo group, and a heartbeat.

    Attributes:
        rank: Global rank; the only authority there is. Rank 0 coordinates.
        world_size: Ranks in the job.
        group: For our own collectives, on the uploader thread only.
        dcp_group: To be named to DCP; see :func:`~dcpsvc.ranks.c10d.group_for_dcp`.
        incarnation: Names this run of the job; the same on every rank, new at every start.
        disconnect: Ends the connection to the store.
    """

    rank: int
    world_size: int
    incarnation: str
    rendezvous: Rendezvous
    group: Gathering
    dcp_group: dist.ProcessGroup | None = None
    heart: Heart | None = None
    disconnect: Callable[[], None] = lambda: None

    @classmethod
    def join(cls, sync_timeout_s: float) -> Job:
        """Meet the other ranks. Collective: every rank of the default group calls it, in the same order.

        Raises:
            DisagreementError: Ranks did not arrive within ``sync_timeout_s``.
        """
        distributed = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        c10d = C10dStore.of_default_group(sync_timeout_s) if distributed else None
        store: KeyValue = SoloStore() if c10d is None else c10d
        rendezvous = _next_place(Rendezvous(rank, world_size, store))
        incarnation = str(rendezvous.meet("open/join", None, lambda _: secrets.token_hex(4), Meeting(sync_timeout_s)))
        rendezvous.namespace = incarnation
        group = Exchange(rank=rank, world_size=world_size, namespace=incarnation, timeout_s=sync_timeout_s)
        group.renew(0)
        dcp_group = group_for_dcp(sync_timeout_s)
        heart = Heart(rendezvous, sync_timeout_s / _BEATS_PER_TIMEOUT)
        disconnect = (lambda: None) if c10d is None else c10d.close
        return cls(rank, world_size, incarnation, rendezvous, group, dcp_group, heart, disconnect)

    @property
    def coordinates(self) -> bool:
        """Whether this rank decides what is decided once."""
        return self.rank == 0

    def meet(self, where: str, message: Any, decide: Callable[[list[Any]], Any], meeting: Meeting) -> Any:
        """See :meth:`Rendezvous.meet`."""
        return self.rendezvous.meet(where, message, decide, meeting)

    def await_coordinator(self, where: str, meeting: Meeting) -> None:
        """The coordinator says that it has come here; the others wait for it, and not at the next meeting, in vain.

        Only where every rank knows that the coordinator comes. Who cannot reach it goes on; one that has died as well.
        """
        with contextlib.suppress(RuntimeError):
            self.rendezvous.follow(where, meeting)

    def linger(self, where: str, timeout_s: float) -> None:
        """The coordinator, which may host the store, stays until the others have read their last verdict."""
        clock, store = self.rendezvous.clock, self.rendezvous.store
        place = f"{self.rendezvous.namespace}/{where}/left"
        if not self.coordinates:
            store.set(f"{place}/{self.rank}", "1")
            return
        deadline = clock.now() + timeout_s
        for rank in range(1, self.world_size):
            while store.get(f"{place}/{rank}") is None and clock.now() < deadline:
                clock.sleep(0.005)

    def leave(self) -> None:
        """Stop the heartbeat, drop the group and the connection to the store. Waits for nobody."""
        if self.heart is not None:
            self.heart.stop()
        self.group.close()
        self.disconnect()


def _next_place(rendezvous: Rendezvous) -> Rendezvous:
    """Where this process meets the others next; places where they waited for it in vain are passed over."""
    for ordinal in _ordinals:
        rendezvous.namespace = f"join-{ordinal}"
        if not rendezvous.was_missed("open/join"):
            break
    return rendezvous


class Heart:
    """Tells the others, every few seconds, that this process is alive: also while a long upload runs."""

    def __init__(self, rendezvous: Rendezvous, interval_s: float) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._beat, args=(rendezvous, interval_s), name="dcpsvc-heartbeat", daemon=True
        )
        if rendezvous.world_size > 1:
            self._thread.start()

    def _beat(self, rendezvous: Rendezvous, interval_s: float) -> None:
        for count in itertools.count():
            try:
                rendezvous.beat(count)
            except RuntimeError as err:  # it may come back; if it does not, the job is over
                logger.debug("no heartbeat: %s", err)
            if self._stopped.wait(interval_s):
                return

    def stop(self) -> None:
        """End the thread; bounded, because a store call may hang in a job that is dying."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)
