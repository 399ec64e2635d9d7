"""Adapter: the folder of PEFT of a checkpoint, put together of all ranks' shards before the first acknowledgement.

The ranks send their parts of the adapter to rank 0 over our own group, some MiB at a time; it writes the files on its
node's disk beside its shard. From then on they share that shard's fate.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import CorruptShardError, ExportError, RankFailure
from dcpsvc.format import layout as layouts
from dcpsvc.format import peft, rounds
from dcpsvc.format.adapter import AdapterFolder
from dcpsvc.format.digest import digest
from dcpsvc.format.safetensors import head, ordered
from dcpsvc.format.shardfile import INNER
from dcpsvc.ranks.messages import LostPeerError
from dcpsvc.ranks.rendezvous import RefusalError
from dcpsvc.storage.bounded import BoundedDisk, NewFiles
from dcpsvc.storage.shards import VerifiedShard

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterable, Iterator
    from pathlib import Path

    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.format.peft import Adapter
    from dcpsvc.format.rounds import Piece
    from dcpsvc.format.safetensors import Entry
    from dcpsvc.ranks.job import Job
    from dcpsvc.ranks.rendezvous import Meeting
    from dcpsvc.storage.base import Store

logger = logging.getLogger("dcpsvc")

_SHARE = 0.5
"""Of the time that ranks wait for each other: what a disk may take while they do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """Makes the folders of one job. Collective; uploader thread.

    Attributes:
        job: The ranks.
        local: Where this rank's shards are.
        local_path: Where that is, and where the folder goes.
        component: What it is made of.
        meeting: How long they wait for each other in a meeting.
        sync: How long in a collective.
        told: Adapters that are known to be left out.
    """

    job: Job
    local: Store
    local_path: Path
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
        disk = BoundedDisk(self.job.rendezvous.clock, "the folder of adapters")
        disk.begin(self.meeting.timeout_s * _SHARE)
        message, made = self._about(disk, mine)
        there = [] if isinstance(message, RankFailure) else _entries(layout, self.component)
        about = self.job.meet(f"{place}/folder", message, functools.partial(self._choose, there), self.meeting)
        adapters = peft.adapters(self.component, about, there)
        self._tell(peft.left_out(self.component, about, adapters))
        shard, files = VerifiedShard([self.local], _healthy(mine)), NewFiles(self.local_path, disk)
        folder = _Folder(self.job, attempt.adapter, shard, files, disk, self.sync.timeout_s * _SHARE)
        try:
            folder.put_together(adapters, made)
            disk.begin(self.meeting.timeout_s * _SHARE)  # nobody waits in a collective any more: it may take longer
            return AdapterFolder(component=self.component, files=files.finish()) if self.job.coordinates else None
        finally:
            disk.begin(self.sync.timeout_s * _SHARE)
            files.close()

    def _tell(self, left_out: Iterable[str]) -> None:
        """Once of each, on one rank."""
        new = sorted({*left_out} - self.told)
        self.told.update(new)
        if new and self.job.coordinates:
            names = ", ".join(new)
            logger.info(
                "the folder of %s is made without the adapters %s: nothing of them is saved", self.component, names
            )

    def _about(self, disk: BoundedDisk, mine: ShardRecord | RankFailure) -> tuple[Any, Collection[str]]:
        """What the module says about its adapters, if this shard says so; which tensors are made of others."""
        rank = self.job.rank
        if isinstance(mine, RankFailure):
            return mine, ()
        try:
            documents = disk.within(VerifiedShard([self.local], mine).documents)
        except Exception as err:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            return RankFailure(rank, "adapter", type(err).__name__, str(err)), ()
        found = peft.description(self.component, documents, rank)
        return {"peft": found["peft"]} if "peft" in found else {}, documents.get(f"{INNER}@{rank}", {})

    def _choose(self, there: list[Entry], said: list[Any]) -> Any:
        """Coordinator: the first that says something, if a folder can be made of it."""
        about: dict[str, Any] = next((one for one in said if one), {})
        try:
            peft.adapters(self.component, about, there)
        except ExportError as err:
            raise RefusalError([RankFailure(0, "adapter", type(err).__name__, str(err))]) from err
        return about


@dataclass(frozen=True, slots=True)
class _Folder:
    """One of them in the making.

    Attributes:
        job: The ranks.
        prefix: Of its keys.
        shard: This rank's.
        files: Its own, on rank 0.
        disk: On which both are.
        limit_s: What that may take while other ranks wait in a collective.
    """

    job: Job
    prefix: str
    shard: VerifiedShard
    files: NewFiles
    disk: BoundedDisk
    limit_s: float

    def put_together(self, adapters: Iterable[Adapter], made: Collection[str]) -> None:
        """All files are written, on rank 0. What goes wrong is raised when nobody waits for this rank any more."""
        failures: list[Exception] = []
        self.disk.begin(self.limit_s)
        for adapter in adapters:
            failures += _tried(functools.partial(_check_plain, adapter.entries, made))
            arriving = self._arriving(ordered(adapter.entries))
            if self.job.coordinates and not failures:
                failures += _tried(functools.partial(self._write, adapter, arriving))
            failures += _tried(functools.partial(_drain, arriving))
        if failures:
            raise failures[0]

    def _write(self, adapter: Adapter, arriving: Iterator[tuple[Piece, memoryview]]) -> None:
        below = f"{self.prefix}{adapter.below}"
        self.files.write(f"{below}{peft.MODEL}", _model(adapter, arriving))
        self.files.write(f"{below}{peft.CONFIG}", [adapter.config])

    def _arriving(self, entries: list[Entry]) -> Generator[tuple[Piece, memoryview]]:
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
                    mine = self.disk.within(functools.partial(self._read, pieces))
            except Exception as err:  # noqa: BLE001 - see above
                failure = err
            said = self.job.group.gather(mine, sizes)
            self.disk.begin(self.limit_s)
            if failure is None and self.job.coordinates:
                try:
                    arrived = rounds.opened(pieces, said)
                except CorruptShardError as err:
                    failure = err
                else:
                    yield from arrived
        if failure is not None:
            raise failure

    def _read(self, pieces: Iterable[Piece]) -> bytearray:
        mine = (piece for piece in pieces if piece.chunk.rank == self.job.rank)
        return rounds.sealed(self.shard.read(piece.chunk.begin, piece.chunk.begin + piece.nbytes) for piece in mine)


@functools.lru_cache(maxsize=2)  # the layout is the same from save to save
def _entries(layout: bytes, component: str) -> list[Entry]:
    return peft.entries(layouts.loads("the layout", layout, digest(layout)), component)


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
