"""Faults for real ranks: where in a checkpoint's life they strike, and what must be as it was before afterwards."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dcpsvc.format.keys import EPOCHS
from dcpsvc.ranks.exchange import Exchange
from dcpsvc.storage.posix import PosixStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_PATIENCE_S = 30.0
_LOOK_S = 0.01
_SETTLE_S = 8.0
_STILL_LOOKS = 10


def record(variable: str, **row: Any) -> None:
    """Append a line of JSON to the file that an environment variable names, if it names one."""
    if name := os.environ.get(variable):
        with Path(name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


# --- ranks that wait for each other, and notice the dead ---------------------------------------------


class PeerDiedError(Exception):
    """A rank that should have come is no more."""


class Crew:
    """The processes of a job, known to each other by pid. Collective to make."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.pids: list[Any] = [None] * world
        dist.all_gather_object(self.pids, os.getpid())
        self._store = dist.distributed_c10d._get_default_store()

    def line(self, name: str, ranks: Iterable[int] | None = None) -> None:
        """Wait until all ``ranks`` have come here. Unlike a collective it leaves nobody half way.

        Raises:
            PeerDiedError: One of them is dead.
        """
        others = range(self.world) if ranks is None else ranks
        self._store.set(f"line/{name}/{self.rank}", "1")
        ends = time.monotonic() + _PATIENCE_S
        for rank in others:
            while not self._store.check([f"line/{name}/{rank}"]):
                if not _alive(self.pids[rank]):
                    raise PeerDiedError(f"rank {rank}, before {name}")
                if time.monotonic() > ends:
                    raise TimeoutError(f"rank {rank} did not come to {name}")
                time.sleep(_LOOK_S)

    def die_together(self) -> None:
        """``kill -9`` for all ranks, this one last."""
        for rank in range(self.world):
            if rank != self.rank:
                os.kill(self.pids[rank], signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def wake(self, rank: int, name: str) -> None:
        """Let a rank that is stopped, or will be in a moment, go on until it comes to a line."""
        ends = time.monotonic() + _PATIENCE_S
        while not self._store.check([f"line/{name}/{rank}"]) and time.monotonic() < ends:
            os.kill(self.pids[rank], signal.SIGCONT)
            time.sleep(5 * _LOOK_S)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def stop_self() -> None:
    """Hang, heartbeat and all, until somebody sends SIGCONT."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread goes no step further


# --- where faults strike ------------------------------------------------------------------------------


class Trap:
    """One place in a checkpoint's life, and what happens to this process when it comes there. Once.

    Places: ``point <event>``; ``before <meeting>``, ``inside <meeting>`` (posted, the verdict not read), ``after
    <meeting>``; ``gather <meeting>`` (inside the collective that follows that meeting); ``<operation> <folder>`` and
    ``done <operation> <folder>`` at the run root.

    Attributes:
        struck_at: On the machine's monotonic clock; None: it has not come there.
    """

    def __init__(self) -> None:
        self._place, self._action = "", lambda: None
        self._lock = threading.Lock()
        self.struck_at: float | None = None
        self.passed_by: list[str] = []

    def set(self, place: str, action: Callable[[], Any]) -> None:
        """Lie in wait at a place; an earlier one is forgotten."""
        with self._lock:
            self._place, self._action, self.struck_at = place, action, None

    def set_aside(self) -> None:
        """Lie in wait no more."""
        with self._lock:
            self._place = ""

    def strike(self) -> None:
        """Something else than the trap's own action begins here; only the first time counts."""
        self.struck_at = self.struck_at or time.monotonic()

    def observe(self, event: Any) -> None:
        """For ``on_event``."""
        self.passed(f"point {event.name}")

    def passed(self, place: str) -> None:
        """This process is at a place."""
        with self._lock:
            self.passed_by.append(place)
            if place != self._place:
                return
            self._place = ""
            self.struck_at = time.monotonic()
        self._action()


class WatchedStore:
    """The ranks' key-value store of one rank, which tells a trap about its meetings."""

    def __init__(self, store: Any, rank: int, trap: Trap) -> None:
        self._store, self._rank, self._trap = store, rank, trap
        self.meeting = ""

    def set(self, key: str, value: str) -> None:
        *_, meeting, name = key.split("/")
        if name != str(self._rank) or meeting == "alive":
            self._store.set(key, value)
            return
        self.meeting = meeting
        self._trap.passed(f"before {meeting}")
        self._store.set(key, value)
        self._trap.passed(f"inside {meeting}")

    def get(self, key: str) -> str | None:
        found = self._store.get(key)
        if found is not None and key.endswith(f"/{self.meeting}/verdict"):
            self._trap.passed(f"after {self.meeting}")
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class StallingGroup(Exchange):
    """A group in which a rank can be caught between the two gathers of one ``all_gather``."""

    @classmethod
    def taking_over(cls, group: Any, watched: WatchedStore, trap: Trap) -> StallingGroup:
        """Goes on with the connections of another."""
        taken = cls.__new__(cls)
        taken.__dict__ |= vars(group)
        taken._watched, taken._trap, taken._gathers = watched, trap, 0
        return taken

    def _gather(self, group: Any, tensor: Any) -> Any:
        self._gathers += 1
        if self._gathers % 2 == 0:
            self._trap.passed(f"gather {self._watched.meeting}")
        return super()._gather(group, tensor)

    def all_gather(self, data: bytes) -> list[bytes]:
        self._gathers = 0
        return super().all_gather(data)


def rig(ckpt: Any, trap: Trap) -> None:
    """Have a Checkpointer's meetings and collectives pass by a trap. Its events and its store must be given one."""
    job = ckpt._job
    job.rendezvous.store = watched = WatchedStore(job.rendezvous.store, job.rank, trap)
    job.group = StallingGroup.taking_over(job.group, watched, trap)


class FaultyStore(PosixStore):
    """A run root in a directory, some operations of which can be made to go wrong in this process.

    Attributes:
        faults: By operation and folder, such as ``create manifests``: called instead, with the operation itself, its
            key and its further arguments.
    """

    def __init__(self, root: Path, trap: Trap | None = None) -> None:
        super().__init__(root)
        self._trap = trap or Trap()
        self.faults: dict[str, Callable[..., Any]] = {}

    def create(self, key: str, data: bytes) -> bool:
        return self._do("create", super().create, key, data)

    def put(self, key: str, data: bytes) -> None:
        self._do("put", super().put, key, data)

    def put_file(self, key: str, path: Path, *, progress: Any = None) -> None:
        self._do("put_file", super().put_file, key, path)

    def get(self, key: str, *, max_nbytes: int) -> bytes:
        return self._do("get", lambda k: PosixStore.get(self, k, max_nbytes=max_nbytes), key)

    def read(self, key: str, begin: int, end: int) -> bytes:
        return self._do("read", super().read, key, begin, end)

    def list(self, prefix: str) -> list[Any]:
        return self._do("list", super().list, prefix)

    def size(self, key: str) -> int:
        return self._do("size", super().size, key)

    def delete(self, key: str) -> None:
        self._do("delete", super().delete, key)

    def _do(self, operation: str, real: Callable[..., Any], key: str, *args: Any) -> Any:
        place = f"{operation} {'epochs' if key.startswith(EPOCHS) else key.split('/', 1)[0]}"
        self._trap.passed(place)
        fault = self.faults.get(place)
        if fault is None:
            result = real(key, *args)
        else:
            self._trap.strike()
            result = fault(real, key, *args)
        self._trap.passed(f"done {place}")
        return result


# --- what must be as it was before ---------------------------------------------------------------------


def footprint() -> Counter[str]:
    """What this process holds: threads by name, descriptors by what they lead to, process groups."""
    found = Counter(f"thread {re.sub(r'[0-9]+', 'N', thread.name)}" for thread in threading.enumerate())
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            where = str(descriptor.readlink())
        except FileNotFoundError:  # the one that lists them
            continue
        found[f"fd {re.sub(r'[0-9]+', 'N', where)}"] += 1
    found["process groups"] = len(dist.distributed_c10d._world.pg_map)
    return found


def at_rest() -> Counter[str]:
    """What this process holds once nothing is ending any more."""
    gc.collect()
    looks = [footprint()]
    while len(looks) < _STILL_LOOKS or any(look != looks[-1] for look in looks[-_STILL_LOOKS:]):
        time.sleep(3 * _LOOK_S)
        looks.append(footprint())
    return looks[-1]


def settled_difference(before: Counter[str]) -> dict[str, int]:
    """What is more or less than before, once what was ending has ended."""
    ends = time.monotonic() + _SETTLE_S
    while True:
        gc.collect()  # what an exception's frames still hold is no leak
        now = footprint()
        difference = {name: now[name] - before[name] for name in now | before if now[name] != before[name]}
        if not difference or time.monotonic() > ends:
            return difference
        time.sleep(5 * _LOOK_S)


def own_threads() -> list[str]:
    """Threads of ours that are still there when a Checkpointer has been closed for a while."""
    ends = time.monotonic() + _SETTLE_S
    while True:
        gc.collect()
        names = sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("dcpsvc"))
        if not names or time.monotonic() > ends:
            return names
        time.sleep(5 * _LOOK_S)


def debris(folder: Path, attempts: Iterable[Any]) -> list[str]:
    """Files of ours below a folder that belong to none of these attempts, however they came there."""
    names = {f"step-{one.step:012d}.{one.attempt}" for one in attempts}
    return sorted(
        str(path.relative_to(folder))
        for path in Path(folder).rglob("*")
        if not path.is_dir() and not _belongs(path.relative_to(folder), names)
    )


def empty_folders(folder: Path) -> list[str]:
    """Attempts' folders in which nothing is left."""
    return sorted(
        str(p.relative_to(folder)) for p in Path(folder).glob("**/data/*") if p.is_dir() and not any(p.iterdir())
    )


def unfinished(folder: Path) -> list[str]:
    """Objects that were being written when their writer was killed."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob(".tmp-*"))


def _belongs(path: Path, attempts: set[str]) -> bool:
    if path.name.startswith(".tmp-"):
        return True  # of these see unfinished()
    if (
        path.suffix == ".lock"
        or path.name in {"run.json", "run-root"}
        or path.parent.name in {"layouts", "epochs", "policies"}
    ):
        return True
    if path.parent.name == "manifests":
        return path.name.removesuffix(".json").partition(".")[2] in attempts  # behind its place in the order
    return path.parent.parent.name == "data" and path.parent.name in attempts
