"""What a simulated rank saves: a few dozen bytes with a real block table, in a real layout."""

from __future__ import annotations

import errno
import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from dcpsvc.errors import RankFailure
from dcpsvc.format import digest, parts, peft, shardfile
from dcpsvc.format.adapter import AdapterFile, AdapterFolder
from dcpsvc.format.manifest import ShardRecord
from dcpsvc.preflight import DiskNeed
from dcpsvc.stages import ack

if TYPE_CHECKING:
    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.parts import Part
    from dcpsvc.ranks.job import Job
    from dcpsvc.ranks.rendezvous import Meeting
    from tests.model.host import Host
    from tests.model.kernel import Task
    from tests.model.stores import Space

_STAMP = {"created": "2026-01-31T23:59:59Z", "metrics": {}, "versions": {}}


class SimShard:
    """A :class:`dcpsvc.save.Shard`: written to the node's disk by a simulated thread once the gate is open."""

    def __init__(self, host: Host, disk: Space, attempt: Attempt) -> None:
        self._host, self._disk, self._key = host, disk, attempt.shard(host.rank)
        self._body = f"{attempt} of {host.process.name}".encode()
        self._writing: Task | None = None
        self._refused = False
        self.seconds = 0.0

    @property
    def ended(self) -> bool:
        return self._refused if self._writing is None else self._writing.done

    def open(self) -> None:
        self._writing = self._host.kernel.spawn(self._host.process, "dcp", self._write)

    def refuse(self, error: BaseException) -> None:
        self._refused = True

    def record(self, timeout_s: float) -> ShardRecord:
        assert self._writing is not None
        if not self._host.kernel.join(self._writing, timeout_s):
            raise TimeoutError(f"the local disk did not take the shard within {timeout_s} s")
        if self._writing.failure is not None:
            raise self._writing.failure
        table = digest.table(memoryview(self._body))
        return ShardRecord(
            rank=self._host.rank,
            path=self._key,
            nbytes=len(self._body) + len(table),
            body_nbytes=len(self._body),
            digest=digest.digest(table),
        )

    def _write(self) -> None:
        kernel, host = self._host.kernel, self._host
        host.at_switch("shard.write")
        fault = host.faults.strike("shard", "shard.write")
        data = self._body + digest.table(memoryview(self._body))
        match fault:
            case "crash" | "freeze":
                host.fall(fault, "shard.write", lambda: self._store(data), 0.01)
                return
            case "refused" | "full":
                self._store(data[: len(data) // 2])
                raise OSError(errno.EIO if fault == "refused" else errno.ENOSPC, "simulated: the disk said no")
            case "memory":
                raise MemoryError("simulated")
            case "exit":
                raise SystemExit(3)
            case "never":
                kernel.wait(2.0 + 10.0 * kernel.random.random())
            case "slow":
                kernel.wait(kernel.random.random() * 3.0)
        kernel.wait(kernel.random.random() * 0.05 * host.process.slowness)
        self._store(data)

    def _store(self, data: bytes) -> None:
        self._disk.change(self._key, data, self._host)


class SimFolders:
    """As :class:`dcpsvc.stages.adapter.Folders`: after a meeting rank 0 writes files of some bytes beside its shard."""

    def __init__(self, host: Host, disk: Space, job: Job, meeting: Meeting) -> None:
        self._host, self._disk, self._job, self._meeting = host, disk, job, meeting

    def make(self, place: str, attempt: Attempt, mine: ShardRecord | RankFailure, layout: Any) -> AdapterFolder | None:
        del layout
        message = mine if isinstance(mine, RankFailure) else ""
        self._job.meet(f"{place}/folder", message, lambda _: None, self._meeting)
        if not self._job.coordinates:
            return None
        files = tuple(self._write(attempt, name) for name in (peft.CONFIG, peft.MODEL))
        return AdapterFolder(component="model", files=files)

    def _write(self, attempt: Attempt, name: str) -> AdapterFile:
        key, data = f"{attempt.adapter}{name}", f"{name} of {attempt} of {self._host.process.name}".encode()
        fault = self._host.faults.strike("shard", "folder.write")
        if fault in {"crash", "freeze"}:
            self._host.fall(fault, "folder.write", lambda: self._disk.change(key, data, self._host), 0.01)
        elif fault in {"refused", "full", "memory"}:
            raise OSError(errno.EIO if fault == "refused" else errno.ENOSPC, "simulated: the disk said no")
        self._host.kernel.wait(self._host.kernel.random.random() * 0.05 * self._host.process.slowness)
        self._disk.change(key, data, self._host)
        return AdapterFile(path=key, nbytes=len(data), digest=digest.digest(data))


class Roomless(DiskNeed):
    """A disk that has no room for this rank's shard, and has none when something was removed."""

    def again(self) -> Self:
        return self


class Cramped(DiskNeed):
    """A disk that has room once something was removed."""

    def again(self) -> Self:
        return replace(self, free_nbytes=self.need_nbytes)


def need(host: Host, fault: str | None) -> DiskNeed | None:
    """What a rank says about the room on its disk."""
    if fault not in {"no-room", "little-room"}:
        return None
    kind = Roomless if fault == "no-room" else Cramped
    return kind(rank=host.rank, disk=host.node.disk, path=f"/sim/{host.node.disk}", need_nbytes=100, free_nbytes=0)


def proposal(rank: int, world_size: int, step: int, structure: str, known_layout: str) -> ack.Proposal:
    """What a rank brings to the first meeting of a save."""
    return ack.Proposal(
        step=step,
        said={"model": {"model.weight": f"F32 [{4 * world_size}] {structure}"}},
        part=layout_part(rank, world_size, structure),
        known_layout=known_layout,
        stamp=_STAMP,
    )


@functools.cache
def layout_part(rank: int, world_size: int, structure: str) -> Part:
    """This rank's part of the layout."""
    piece = shardfile.Piece(f"model.{structure}", "F32", (4 * world_size,), (4 * rank,), (4,))
    return parts.part(shardfile.place([piece]), rank, {})
