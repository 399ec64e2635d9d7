"""Jobs that take turns at the calls of a run root: any interleaving, any crash, any zombie, on purpose.

Each job is a thread that stops before every call to its stores until it is given a turn, so exactly one runs at a time
and a test decides which. One that gets no turn is stopped, as by SIGSTOP; one that is killed never makes its next call.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dcpsvc.deadline import SystemClock
from dcpsvc.errors import StoreError
from dcpsvc.format import digest
from dcpsvc.format.manifest import LayoutRef, Manifest, ShardRecord
from dcpsvc.ranks.c10d import SoloStore
from dcpsvc.ranks.job import Job
from dcpsvc.ranks.rendezvous import Meeting, Rendezvous
from dcpsvc.storage import memory
from dcpsvc.storage.memory import MemoryStore
from dcpsvc.tiers import Tiers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Entry

PATIENCE_S = 30.0
MEETING = Meeting(PATIENCE_S)
RUN_ID = "r1"
LAYOUT = b'{"format": 1, "aliases": {}, "tensors": {}}'


class Killed(BaseException):
    """Ends the thread of a job that is killed."""


class Place(MemoryStore):
    """A run root, or a disk, that nobody finds by its name.

    Attributes:
        hidden: Keys that the jobs' listings do not show yet.
    """

    def __init__(self, name: str = "root") -> None:
        self._url, self._space = f"memory://{name}", memory._Space()
        self.hidden: set[str] = set()

    @property
    def objects(self) -> dict[str, bytes]:
        return self._space.objects

    def below(self, prefix: str) -> list[str]:
        return [entry.key for entry in self.list(prefix)]


class Seat(MemoryStore):
    """A place as one job sees it: every call waits for the job's turn.

    Args:
        place: What is there.
        turn: The job's.
        disks: Where ``put_file`` finds local files, by the first part of their path.
        atomic: Whether ``create`` looks and writes in one go.
    """

    def __init__(
        self, place: Place, turn: Turn | Free, disks: dict[str, Place] | None = None, *, atomic: bool = True
    ) -> None:
        self._url, self._space, self._hidden = place.url, place._space, place.hidden
        self._turn, self._disks, self._atomic = turn, disks or {}, atomic

    @property
    def atomic_create(self) -> bool:
        return self._atomic

    def create(self, key: str, data: bytes) -> bool:
        self._turn.wait("create", key)
        if self._atomic:
            return super().create(key, data)
        if key in self._space.objects:
            return False
        self._turn.wait("create it after all", key)
        super().put(key, data)
        return True

    def put(self, key: str, data: bytes) -> None:
        self._turn.wait("put", key)
        super().put(key, data)

    def put_file(self, key: str, path: Path, *, progress: Callable[[int], None] | None = None) -> None:
        self._turn.wait("put_file", key)
        _, disk, name = str(path).split("/", 2)
        data = self._disks[disk].objects.get(name)
        if data is None:
            raise StoreError("put_file", key, f"the local file {path} cannot be read")
        super().put(key, data)

    def get(self, key: str, *, max_nbytes: int) -> bytes:
        self._turn.wait("get", key)
        return super().get(key, max_nbytes=max_nbytes)

    def read(self, key: str, begin: int, end: int) -> bytes:
        self._turn.wait("read", key)
        return super().read(key, begin, end)

    def list(self, prefix: str) -> list[Entry]:
        self._turn.wait("list", prefix)
        return [entry for entry in super().list(prefix) if entry.key not in self._hidden]

    def size(self, key: str) -> int:
        self._turn.wait("size", key)
        return super().size(key)

    def delete(self, key: str) -> None:
        self._turn.wait("delete", key)
        super().delete(key)


class Free:
    """For jobs that wait for nobody's turn."""

    def wait(self, call: str, key: str) -> None:
        """Go on."""


class Turn:
    """One job.

    Attributes:
        at: The call it is about to make, and its key.
        calls: How many it has made.
        running: Whether it has more to do.
        value: What its work returned.
        error: What its work raised.
    """

    def __init__(self, name: str, work: Callable[[Turn], Any]) -> None:
        self.name = name
        self.at: tuple[str, str] = ("begin", "")
        self.calls, self.running = -1, True
        self.value: Any = None
        self.error: BaseException | None = None
        self._killed = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"{self.name} at {' '.join(self.at)}" if self.running else f"{self.name}, ended"

    def wait(self, call: str, key: str) -> None:
        """On the job's thread, before each call: until it gets its turn."""
        self.at = (call, key)
        self._stopped.release()
        self._await_turn()

    def step(self) -> bool:
        """Let it make its next call and come to the one after; says whether there is one."""
        if self.running:
            self._go.release()
            assert self._stopped.acquire(timeout=PATIENCE_S), f"{self!r} hangs"
            if not self.running:
                self._thread.join()
        return self.running

    def until(self, call: str, below: str = "", *, ending: str = "") -> Self:
        """Let it run until it is about to make a certain call."""
        while not (self.at[0] == call and self.at[1].startswith(below) and self.at[1].endswith(ending)):
            assert self.step(), f"{self.name} ended and never made the call {call} {below}: {self.error or self.value}"
        return self

    def end(self) -> Any:
        """Let it run to its end; what its work returned, or raised."""
        while self.step():
            pass
        if self.error is not None:
            raise self.error
        return self.value

    def kill(self) -> None:
        """It never makes its next call."""
        self._killed = True
        while self.step():
            pass

    def _run(self, work: Callable[[Turn], Any]) -> None:
        try:
            self._await_turn()
            self.value = work(self)
        except Killed:
            pass
        except BaseException as err:  # noqa: BLE001 - the test looks at it
            self.error = err
        finally:
            self.running = False
            self._stopped.release()

    def _await_turn(self) -> None:
        self._go.acquire()
        self.calls += 1
        if self._killed:
            raise Killed


class Play:
    """Jobs on one run root, each with a disk; whoever still runs at the end is killed.

    Args:
        atomic: Whether the run root creates atomically.
        local: Whether a job's calls to its own disk take turns too.
    """

    def __init__(self, *, atomic: bool = True, local: bool = False) -> None:
        self.root = Place()
        self.turns: list[Turn] = []
        self._disks: dict[str, Place] = {}
        self._atomic, self._local = atomic, local

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for turn in self.turns:
            turn.kill()

    def disk(self, name: str) -> Place:
        """A node's disk, empty at first."""
        return self._disks.setdefault(name, Place(name))

    def put_in(self, disk: Place) -> None:
        """Use a disk of the test's own."""
        self._disks[disk.url.removeprefix("memory://")] = disk

    def job(self, token: str, work: Callable[..., Any], *args: Any, disk: str = "") -> Turn:
        """A job of one rank that calls ``work(job, tiers, *args)``; it stands before its first call."""
        name = disk or f"disk-of-{token}"
        place = self.disk(name)

        def run(turn: Turn) -> Any:
            remote = Seat(self.root, turn, self._disks, atomic=self._atomic)
            local = Seat(place, turn) if self._local else place
            return work(
                solo(token), Tiers(run_id=RUN_ID, remote=remote, local=local, local_path=Path(f"/{name}")), *args
            )

        turn = Turn(token, run)
        self.turns.append(turn)
        turn.step()
        return turn


class Direct(SystemClock):
    """Work with a deadline is done at once, on the thread that asks for it."""

    def bounded(
        self,
        work: Callable[[], Any],
        timeout_s: float,
        what: str,
        given_up: Callable[[], str] | None = None,
    ) -> Any:
        return work()


def solo(token: str) -> Job:
    """A job of one rank."""
    return Job(0, 1, token, Rendezvous(0, 1, SoloStore(), Direct(), token), group=None)


def shard(attempt: Attempt, rank: int = 0) -> tuple[ShardRecord, bytes]:
    """A small shard, different in every attempt and rank."""
    body = f"{attempt} rank {rank}".encode()
    table = digest.table(memoryview(body))
    content = body + table
    record = ShardRecord(
        rank=rank,
        path=attempt.shard(rank),
        nbytes=len(content),
        body_nbytes=len(body),
        digest=digest.digest(table),
    )
    return record, content


def manifest(attempt: Attempt, world_size: int = 1, *, run_id: str = RUN_ID) -> Manifest:
    """The manifest of such shards."""
    return Manifest(
        run_id=run_id,
        step=attempt.step,
        attempt=attempt.attempt,
        created="2026-01-31T23:59:59Z",
        shards=tuple(shard(attempt, rank)[0] for rank in range(world_size)),
        layout=LayoutRef(digest=digest.digest(LAYOUT), nbytes=len(LAYOUT)),
    )


def put_shards(place: MemoryStore, attempt: Attempt, ranks: Iterable[int] = (0,)) -> None:
    for rank in ranks:
        record, content = shard(attempt, rank)
        place.put(record.path, content)


def put_journal(place: MemoryStore, attempt: Attempt, world_size: int = 1, ranks: Iterable[int] | None = None) -> None:
    """What a node has of an attempt whose shards were all durable; by default all of them are here."""
    place.put(manifest(attempt).layout.path, LAYOUT)
    put_shards(place, attempt, range(world_size) if ranks is None else ranks)
    place.put(attempt.manifest, manifest(attempt, world_size).dumps())


def put_checkpoint(place: MemoryStore, attempt: Attempt, world_size: int = 1) -> None:
    """A whole checkpoint at a run root."""
    put_journal(place, attempt, world_size)


def at_once(work: Callable[[], Any]) -> Any:
    """A store call without a deadline."""
    return work()
