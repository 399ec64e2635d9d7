"""The folder of PEFT of a checkpoint: put together of all ranks' shards before the first acknowledgement.

Each rank's part of the adapter goes over our own group, some MiB at a time, to rank 0, which writes the files on its
node's disk beside its shard. From then on they share that shard's fate.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from dcpsvc.errors import CorruptShardError, ExportError, RankFailure
from dcpsvc.format import layout as layouts
from dcpsvc.format import peft, rounds
from dcpsvc.format.adapter import AdapterFolder
from dcpsvc.format.digest import digest
from dcpsvc.format.safetensors import head, ordered
from dcpsvc.ranks.messages import LostPeerError
from dcpsvc.ranks.rendezvous import RefusalError
from dcpsvc.storage.shards import VerifiedShard
from dcpsvc.storage.wholefile import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from dcpsvc.format.adapter import AdapterFile
    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.format.peft import Adapter
    from dcpsvc.format.rounds import Piece
    from dcpsvc.format.safetensors import Entry
    from dcpsvc.ranks.job import Job
    from dcpsvc.ranks.rendezvous import Meeting
    from dcpsvc.tiers import Tiers

T = TypeVar("T")
logger = logging.getLogger("dcpsvc")


class Within(Protocol):
    """Runs what a disk does, with a deadline; raises TimeoutError past it."""

    def __call__(self, work: Callable[[], T], /) -> T:
        """What the work gives."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """Makes the folders of one job. Collective; uploader thread.

    Attributes:
        job: The ranks.
        tiers: Where the shards are, and where the folder goes.
        component: What it is made of.
        meeting: Deadlines.
        within: For everything that waits for a disk.
        told: Adapters that are known to be left out.
    """

    job: Job
    tiers: Tiers
    component: str
    meeting: Meeting
    within: Within
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
        message = self._about(mine)
        there = [] if isinstance(message, RankFailure) else _entries(layout, self.component)
        about = self.job.meet(f"{place}/folder", message, functools.partial(self._choose, there), self.meeting)
        shard = VerifiedShard([self.tiers.local], _healthy(mine))
        files: list[AdapterFile] = []
        failures: list[Exception] = []
        adapters = peft.adapters(self.component, about, there)
        self._tell(peft.left_out(self.component, about, adapters))
        for adapter in adapters:
            arriving = self._exchange(shard, ordered(adapter.entries))
            if self.job.coordinates:
                failures += _tried(functools.partial(self._put_together, attempt, adapter, arriving, files))
            failures += _tried(functools.partial(_drain, arriving))
        if failures:
            raise failures[0]
        return AdapterFolder(component=self.component, files=_sorted(files)) if files else None

    def _tell(self, left_out: Iterable[str]) -> None:
        """Once of each, on one rank."""
        new = sorted({*left_out} - self.told)
        self.told.update(new)
        if new and self.job.coordinates:
            names = ", ".join(new)
            logger.info(
                "the folder of %s is made without the adapters %s: nothing of them is saved", self.component, names
            )

    def _about(self, mine: ShardRecord | RankFailure) -> Any:
        """What the module says about its adapters, if it is this rank's shard that says so."""
        if isinstance(mine, RankFailure):
            return mine
        name = self.component.split(".", 1)[0]
        try:
            documents = self.within(VerifiedShard([self.tiers.local], mine).documents)
        except Exception as err:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            return RankFailure(self.job.rank, "adapter", type(err).__name__, str(err))
        found = documents.get(name) or documents.get(f"{name}@{self.job.rank}") or {}
        return {"peft": found["peft"]} if "peft" in found else {}

    def _choose(self, there: list[Entry], said: list[Any]) -> Any:
        """Coordinator: the first that says something, if a folder can be made of it."""
        about: dict[str, Any] = next((one for one in said if one), {})
        try:
            peft.adapters(self.component, about, there)
        except ExportError as err:
            raise RefusalError([RankFailure(0, "adapter", type(err).__name__, str(err))]) from err
        return about

    def _put_together(
        self, attempt: Attempt, adapter: Adapter, arriving: Iterator[tuple[Piece, memoryview]], files: list[AdapterFile]
    ) -> None:
        prefix = f"{attempt.adapter}{adapter.below}"
        files.append(self._file(f"{prefix}{peft.CONFIG}", [adapter.config]))
        files.append(self._file(f"{prefix}{peft.MODEL}", _model(adapter, arriving)))

    def _file(self, key: str, parts: Iterable[bytes | memoryview]) -> AdapterFile:
        """The ranks are waited for on this thread, the disk on another, with a deadline."""
        with contextlib.closing(Writer(self.tiers.local_path / key, key)) as writer:
            for part in parts:
                self.within(functools.partial(writer.write, part))
            return self.within(writer.finish)

    def _exchange(self, shard: VerifiedShard, entries: list[Entry]) -> Generator[tuple[Piece, memoryview]]:
        """On rank 0 every piece, in order. What goes wrong here is raised when nobody waits any more."""
        failure: Exception | None = None
        for pieces in rounds.rounds(entries):
            mine = b""
            try:
                mine = self.within(functools.partial(self._read, shard, pieces))
            except Exception as err:  # noqa: BLE001 - see above
                failure = failure or err
            said = self.job.group.all_gather(rounds.sealed(mine))
            if failure is None and self.job.coordinates:
                try:
                    arrived = rounds.opened(pieces, said)
                except CorruptShardError as err:
                    failure = err
                else:
                    yield from arrived
        if failure is not None:
            raise failure

    def _read(self, shard: VerifiedShard, pieces: Iterable[Piece]) -> bytes:
        mine = (piece for piece in pieces if piece.chunk.rank == self.job.rank)
        return b"".join(shard.read(piece.chunk.begin, piece.chunk.begin + piece.nbytes) for piece in mine)


@functools.lru_cache(maxsize=2)  # the layout is the same from save to save
def _entries(layout: bytes, component: str) -> list[Entry]:
    return peft.entries(layouts.loads("the layout", layout, digest(layout)), component)


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
