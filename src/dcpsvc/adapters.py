"""The folder of PEFT of a checkpoint: put together of all ranks' shards before the first acknowledgement.

The ranks send their parts of the adapter to rank 0 over our own group, some MiB at a time; it writes the files on its
node's disk beside its shard. From then on they share that shard's fate.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from dcpsvc.errors import CorruptShardError, ExportError, RankFailure
from dcpsvc.format import layout as layouts
from dcpsvc.format import peft, rounds
from dcpsvc.format.adapter import AdapterFolder
from dcpsvc.format.digest import digest
from dcpsvc.format.safetensors import head, ordered
from dcpsvc.format.shardfile import INNER
from dcpsvc.ranks.messages import LostPeerError
from dcpsvc.ranks.rendezvous import RefusalError
from dcpsvc.storage.shards import VerifiedShard
from dcpsvc.storage.wholefile import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence

    from dcpsvc.format.adapter import AdapterFile
    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.format.peft import Adapter
    from dcpsvc.format.rounds import Piece
    from dcpsvc.format.safetensors import Entry
    from dcpsvc.ranks.job import Job
    from dcpsvc.ranks.rendezvous import Clock, Meeting
    from dcpsvc.tiers import Tiers

T = TypeVar("T")
logger = logging.getLogger("dcpsvc")


_SHARE = 0.5
"""Of the time that ranks wait for each other: what a disk may take while they do."""


class Disk:
    """What a disk does, with a deadline. One thread.

    Args:
        clock: For the deadline.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._limit_s = self._ends = 0.0

    def begin(self, limit_s: float) -> None:
        """All that it does from now on together, until this is called again, takes at most so long."""
        self._limit_s, self._ends = limit_s, self._clock.now() + limit_s

    def within(self, work: Callable[[], T]) -> T:
        """What the work gives; raises TimeoutError past the deadline, and leaves it behind."""
        left_s = self._ends - self._clock.now()
        try:
            if left_s > 0:
                return self._clock.bounded(work, left_s, "the disk")
        except TimeoutError:
            pass
        raise TimeoutError(f"this node's disk took longer than {self._limit_s:g} s over the folder of adapters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """Makes the folders of one job. Collective; uploader thread.

    Attributes:
        job: The ranks.
        tiers: Where the shards are, and where the folder goes.
        component: What it is made of.
        meeting: How long they wait for each other in a meeting.
        sync: How long in a collective.
        told: Adapters that are known to be left out.
    """

    job: Job
    tiers: Tiers
    component: str
    meeting: Meeting
    sync: Meeting
    told: set[str] = field(default_factory=set[str])

    def make(self, place: str, attempt: Attempt, mine: ShardRecord | RankFailure, layout: Any) -> AdapterFolder | None:
        """On rank 0 the folder, durable on its node's disk; None on the others.

        Args:
            place: Where the ranks meet about the attempt.
            attempt: Whose folder.
            mine: This rank's shard, durable on its node's disk, or why there is none.
            layout: Where every tensor lies in the shards; not looked at if there is no shard.

        Raises:
            DisagreementError: A rank failed or is missing, or the module has no adapters: the same on every rank.
            LostPeerError: A peer died inside a collective.
            CorruptShardError: A shard is not what was written, or was not when it came here.
            StoreError: The disk does not take it, or does not give what it has.
            TimeoutError: Not in time.
        """
        disk = Disk(self.job.rendezvous.clock)
        disk.begin(self.meeting.timeout_s * _SHARE)
        message, made = self._about(disk, mine)
        there = [] if isinstance(message, RankFailure) else _entries(layout, self.component)
        about = self.job.meet(f"{place}/folder", message, functools.partial(self._choose, there), self.meeting)
        shard = VerifiedShard([self.tiers.local], _healthy(mine))
        failures: list[Exception] = []
        disk.begin(self.sync.timeout_s * _SHARE)
        adapters = peft.adapters(self.component, about, there)
        self._tell(peft.left_out(self.component, about, adapters))
        writers: list[Writer] = []
        try:
            for adapter in adapters:
                failures += _tried(functools.partial(_check_plain, adapter.entries, made))
                arriving = self._arriving(disk, shard, ordered(adapter.entries))
                if self.job.coordinates and not failures:
                    writers.append(self._writer(attempt, adapter, peft.MODEL))
                    failures += _tried(functools.partial(_write, disk, writers[-1], _model(adapter, arriving)))
                failures += _tried(functools.partial(_drain, arriving))
            if failures:
                raise failures[0]
            return self._finished(disk, attempt, adapters, writers) if writers else None
        finally:
            disk.begin(self.sync.timeout_s * _SHARE)
            _close(disk, writers)

    def _finished(
        self, disk: Disk, attempt: Attempt, adapters: Iterable[Adapter], writers: list[Writer]
    ) -> AdapterFolder:
        """Nobody waits in a collective any more: the disk may take longer."""
        disk.begin(self.meeting.timeout_s * _SHARE)
        for adapter in adapters:
            writers.append(self._writer(attempt, adapter, peft.CONFIG))
            _write(disk, writers[-1], [adapter.config])
        files = [disk.within(writer.finish) for writer in writers]
        return AdapterFolder(component=self.component, files=_sorted(files))

    def _writer(self, attempt: Attempt, adapter: Adapter, name: str) -> Writer:
        key = f"{attempt.adapter}{adapter.below}{name}"
        return Writer(self.tiers.local_path / key, key)

    def _tell(self, left_out: Iterable[str]) -> None:
        """Once of each, on one rank."""
        new = sorted({*left_out} - self.told)
        self.told.update(new)
        if new and self.job.coordinates:
            names = ", ".join(new)
            logger.info(
                "the folder of %s is made without the adapters %s: nothing of them is saved", self.component, names
            )

    def _about(self, disk: Disk, mine: ShardRecord | RankFailure) -> tuple[Any, Collection[str]]:
        """What the module says about its adapters, if this shard says so; which tensors are made of others."""
        if isinstance(mine, RankFailure):
            return mine, ()
        name = self.component.split(".", 1)[0]
        try:
            documents = disk.within(VerifiedShard([self.tiers.local], mine).documents)
        except Exception as err:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            return RankFailure(self.job.rank, "adapter", type(err).__name__, str(err)), ()
        found = documents.get(name) or documents.get(f"{name}@{self.job.rank}") or {}
        return {"peft": found["peft"]} if "peft" in found else {}, documents.get(f"{INNER}@{self.job.rank}", {})

    def _choose(self, there: list[Entry], said: list[Any]) -> Any:
        """Coordinator: the first that says something, if a folder can be made of it."""
        about: dict[str, Any] = next((one for one in said if one), {})
        try:
            peft.adapters(self.component, about, there)
        except ExportError as err:
            raise RefusalError([RankFailure(0, "adapter", type(err).__name__, str(err))]) from err
        return about

    def _arriving(self, disk: Disk, shard: VerifiedShard, entries: list[Entry]) -> Generator[tuple[Piece, memoryview]]:
        """On rank 0 every piece, in order. What goes wrong here is raised when nobody waits any more.

        The others wait in a collective for what a disk does here and what is done with the pieces: it ends before they
        give up, so that it is this rank that says what it was.
        """
        failure: Exception | None = None
        for pieces in rounds.rounds(entries):
            sizes = rounds.sizes(pieces, self.job.world_size)
            mine = bytearray(sizes[self.job.rank])
            try:
                if failure is None and mine:
                    mine = disk.within(functools.partial(self._read, shard, pieces))
            except Exception as err:  # noqa: BLE001 - see above
                failure = err
            said = self.job.group.gather(mine, sizes)
            disk.begin(self.sync.timeout_s * _SHARE)
            if failure is None and self.job.coordinates:
                try:
                    arrived = rounds.opened(pieces, said)
                except CorruptShardError as err:
                    failure = err
                else:
                    yield from arrived
        if failure is not None:
            raise failure

    def _read(self, shard: VerifiedShard, pieces: Iterable[Piece]) -> bytearray:
        mine = (piece for piece in pieces if piece.chunk.rank == self.job.rank)
        return rounds.sealed(shard.read(piece.chunk.begin, piece.chunk.begin + piece.nbytes) for piece in mine)


@functools.lru_cache(maxsize=2)  # the layout is the same from save to save
def _entries(layout: bytes, component: str) -> list[Entry]:
    return peft.entries(layouts.loads("the layout", layout, digest(layout)), component)


def _write(disk: Disk, writer: Writer, parts: Iterable[bytes | memoryview]) -> None:
    """The ranks are waited for on this thread, the disk on another."""
    for part in parts:
        disk.within(functools.partial(writer.write, part))


def _close(disk: Disk, writers: Sequence[Writer]) -> None:
    """One that hangs in it is left behind with the rest."""
    if writers:
        with contextlib.suppress(TimeoutError, OSError):  # they are whole, or something else has gone wrong before
            disk.within(functools.partial(_close_all, writers))


def _close_all(writers: Iterable[Writer]) -> None:
    for writer in writers:
        writer.close()


def _check_plain(entries: Iterable[Entry], made: Collection[str]) -> None:
    if outer := peft.outer(entries, made):
        reason = "is made of others, which a folder of PEFT cannot say; leave out adapter_folder"
        raise ExportError(outer, f"{reason}, or train the adapter in a plain dtype")


def _model(adapter: Adapter, arriving: Iterator[tuple[Piece, memoryview]]) -> Iterator[bytes | memoryview]:
    yield head(ordered(adapter.entries))
    yield from rounds.assembled(arriving)


def _healthy(mine: ShardRecord | RankFailure) -> ShardRecord:
    assert not isinstance(mine, RankFailure)  # noqa: S101 - a failure would have ended the meeting
    return mine


def _tried(work: Callable[[], object]) -> list[Exception]:
    """What went wrong; the others go on to the next exchange whatever it is, but not without a peer."""
    try:
        work()
    except LostPeerError:
        raise
    except Exception as err:  # noqa: BLE001 - see above
        return [err]
    return []


def _drain(arriving: Iterable[Any]) -> None:
    """Whoever needs no more keeps nobody waiting."""
    for _ in arriving:
        pass


def _sorted(files: Iterable[AdapterFile]) -> tuple[AdapterFile, ...]:
    return tuple(sorted(files, key=lambda file: file.path))
