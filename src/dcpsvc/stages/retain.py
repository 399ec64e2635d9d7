"""Retain: delete what is not to stay, on both tiers. What stays is decided elsewhere (:mod:`dcpsvc.decision`).

The only way anything is deleted, by a job and by ``dcpsvc gc`` alike: tombstone, a look for a newer owner and for pins,
manifest, data, what lies beside, tombstone gone. So a deletion that was cut short is finished by whoever comes next.
"""

from __future__ import annotations

from collections import defaultdict
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from dcpsvc import sidefiles
from dcpsvc.errors import FormatError, StoreNotFoundError, StoreObjectError
from dcpsvc.format import manifest
from dcpsvc.format.keys import DATA, MANIFESTS, Attempt, Epoch, attempt_below, attempt_of, writer_of
from dcpsvc.format.parse import compact
from dcpsvc.storage.base import is_there

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from dcpsvc.storage.base import Store


class Removal(Enum):
    """What became of a deletion."""

    DONE = "done"
    BEGUN = "the checkpoint is gone, and some of its files are still there: their turn comes with a later commit"
    HELD = "somebody has begun to use it: it stays"
    LATER = "the time for this round is over"
    NOT_OURS = "a newer job owns the run root: it is that job's to decide"


class Pace(Protocol):
    """How fast objects may be deleted."""

    def more(self, nbytes: int = 0) -> bool:
        """Wait for one's turn to delete an object of that size; False once the time for this round is over."""
        ...


class _Flatout:
    def more(self, nbytes: int = 0) -> bool:
        del nbytes
        return True


FLAT_OUT: Pace = _Flatout()
"""One deletion after the other, as fast as the store answers."""


class Clock(Protocol):
    """Seconds that only grow, and pauses."""

    def now(self) -> float:
        """Seconds."""
        ...

    def sleep(self, seconds: float) -> None:
        """Pause."""
        ...


class Rate:
    """Lets so many deletions a second pass, for a share of the time that a commit has; see :class:`Pace`.

    Args:
        per_s: None: as fast as the store answers.
        clock: For the pauses.
    """

    def __init__(self, per_s: float | None, clock: Clock) -> None:
        self._per_s, self._clock = per_s, clock
        self._next = self._ends = clock.now()

    def begin(self, seconds: float) -> None:
        """A round, for so long."""
        self._ends = self._clock.now() + seconds

    def more(self, nbytes: int = 0) -> bool:
        """See :meth:`Pace.more`."""
        del nbytes
        now_s = self._clock.now()
        if max(self._next, now_s) > self._ends:
            return False
        if self._per_s is not None:
            if self._next > now_s:
                self._clock.sleep(self._next - now_s)
            self._next = max(self._next, now_s) + 1.0 / self._per_s
        return True


def condemn(store: Store, attempt: Attempt, owned: Callable[[], bool]) -> bool:
    """Mark an attempt for deletion; says whether it may be deleted now. Coordinator.

    A newer job may be reading, or finishing, this very attempt. It looks at the tombstones after its claim; we look for
    its claim after our tombstone. So one of the two steps back, whatever the order. If it is we, the mark stays: a
    mark at something that counts is taken away by the next start.
    """
    store.create(attempt.tombstone, compact({"step": attempt.step, "attempt": attempt.attempt}))
    return owned()


def remove(
    store: Store,
    attempt: Attempt,
    owned: Callable[[], bool],
    *,
    held: Callable[[], bool] = lambda: False,
    pace: Pace = FLAT_OUT,
) -> Removal:
    """Delete one checkpoint from a run root. Coordinator.

    Once the manifest is gone it does not exist; cut short, it is resumable.

    Args:
        store: The run root.
        attempt: The checkpoint.
        owned: Asked once the tombstone is there: whether this job still owns the root.
        held: Asked after that: whether somebody has begun to use it; see :mod:`dcpsvc.sidefiles`.
        pace: Of the deletions.
    """
    if not condemn(store, attempt, owned):
        return Removal.NOT_OURS
    if held():
        store.delete(attempt.tombstone)
        return Removal.HELD
    return Removal.DONE if finish_removal(store, attempt, pace) else Removal.BEGUN


def finish_removal(store: Store, attempt: Attempt, pace: Pace = FLAT_OUT) -> bool:
    """Delete what is left of an attempt that was condemned, and the mark last; says whether nothing is left."""
    store.delete(attempt.manifest)
    if not remove_data(store, attempt, pace):
        return False
    sidefiles.forget(store, attempt)
    store.delete(attempt.tombstone)
    return True


def remove_data(store: Store, attempt: Attempt, pace: Pace = FLAT_OUT) -> bool:
    """Delete every object below an attempt's own prefix; says whether nothing is left."""
    for entry in store.list(attempt.data):
        if not pace.more(entry.nbytes):
            return False
        store.delete(entry.key)
    return True


def debris(store: Store, epoch: Epoch, inherited: Collection[Attempt]) -> list[Attempt]:
    """Attempts of jobs before ``epoch`` that are no checkpoints and never will be. LISTs of all there is, once.

    Also one that was inherited, if its manifest is all there is of it: a write that was on its way while the checkpoint
    was finished by another job, and deleted.
    """
    shards, manifests = ([entry.key for entry in store.list(prefix)] for prefix in (DATA, MANIFESTS))
    found = [*(attempt_below(key) for key in shards), *(attempt_of(key) for key in manifests)]
    attempts = {attempt for attempt in found if attempt is not None}
    attempts |= sidefiles.beside(store)
    older = {one for one in attempts if one.epoch.number > 0 and one.epoch < epoch}
    hollow = older.intersection(inherited) - {attempt_below(key) for key in shards}
    return sorted(one for one in older if one not in inherited or (one in hollow and _is_hollow(store, one)))


def _is_hollow(store: Store, attempt: Attempt) -> bool:
    """The listing shows no file of it; one that lies behind, or files of another one, must not cost a checkpoint."""
    try:
        data = store.get(attempt.manifest, max_nbytes=manifest.MAX_NBYTES)
        named = [shard.path for shard in manifest.loads(attempt.manifest, data).shards]
    except StoreNotFoundError:
        return True
    except (FormatError, StoreObjectError):
        named = [attempt.shard(0)]
    return not any(is_there(store, path) for path in named)


def trim_local(store: Store, *, rank: int, world_size: int, keep: int, newest: Attempt) -> None:
    """Leave the ``keep`` newest attempts of this rank on the local tier, ``newest`` in any case.

    Shards of ranks beyond the world size, from a larger job on this disk, are shared out by rank modulo world size.
    """
    mine: dict[Attempt, list[str]] = defaultdict(list)
    for entry in store.list(DATA):
        attempt, shard_rank = attempt_below(entry.key), writer_of(entry.key)
        if attempt is not None and shard_rank is not None and shard_rank % world_size == rank:
            mine[attempt].append(entry.key)
    for attempt in sorted(mine, key=lambda one: (one.step, one.epoch))[:-keep]:
        if attempt != newest:
            store.delete(attempt.manifest)
            for key in mine[attempt]:
                store.delete(key)


def remove_local(store: Store, attempt: Attempt, rank: int) -> None:
    """Delete this rank's part of a checkpoint from its node's local tier."""
    store.delete(attempt.manifest)
    if rank == 0:  # before its shard, by which whoever comes next sees that something is left
        for entry in store.list(attempt.adapter):
            store.delete(entry.key)
    store.delete(attempt.shard(rank))
