"""The run root and the nodes' disks: objects in memory, behind stores that delay, fail, lie and answer late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from dcpsvc.errors import StoreAccessError, StoreError, StoreFullError, StoreNotFoundError, StoreUnavailableError
from dcpsvc.format.keys import NO_EPOCH
from dcpsvc.storage.base import Entry
from dcpsvc.storage.ranges import check_end, check_limit
from tests.model.kernel import Killed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.model.host import Host

T = TypeVar("T")

LAG_S = 0.3
"""How far a stale listing may lie behind."""


class Space:
    """Objects under keys, with a memory of the recent past for stale listings.

    Attributes:
        watch: Called after each change with the key, what was there, what is there now and whose doing it was.
        asked: Called when somebody begins to create something, with the key and who it is.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.objects: dict[str, bytes] = {}
        self.watch: Callable[[str, bytes | None, bytes | None, Host], None] | None = None
        self.asked: Callable[[str, Host], None] | None = None
        self._past: list[tuple[float, str, bytes | None]] = []

    def change(self, key: str, data: bytes | None, author: Host) -> None:
        """Write or remove an object."""
        old = self.objects.get(key)
        if data is None:
            self.objects.pop(key, None)
        else:
            self.objects[key] = data
        self._past.append((author.kernel.now, key, old))
        if self.watch is not None and old != data:
            self.watch(key, old, data, author)

    def entries(self, prefix: str) -> list[Entry]:
        """What is there."""
        return sorted([Entry(key, len(data)) for key, data in self.objects.items() if key.startswith(prefix)])

    def entries_at(self, prefix: str, moment: float) -> list[Entry]:
        """What was there."""
        objects: dict[str, bytes | None] = dict(self.objects)
        for when, key, old in reversed(self._past):
            if when < moment:
                break
            objects[key] = old
        found = ((key, data) for key, data in objects.items() if data is not None and key.startswith(prefix))
        return sorted(Entry(key, len(data)) for key, data in found)


class Snapshot:
    """A consistent look at a space that takes no time: for invariants."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self.url = f"sim://{space.name}"

    def get(self, key: str, *, max_nbytes: int) -> bytes:
        del max_nbytes
        return found(self._space, "get", key)

    def read(self, key: str, begin: int, end: int) -> bytes:
        return part(self._space, key, begin, end)

    def list(self, prefix: str) -> list[Entry]:
        return self._space.entries(prefix)

    def size(self, key: str) -> int:
        return len(found(self._space, "size", key))


class SimStore:
    """A :class:`dcpsvc.storage.base.Store` as one process sees it. Subclasses say what can go wrong with it."""

    def __init__(self, host: Host, space: Space, disks: dict[str, Space], *, atomic_create: bool = True) -> None:
        self._host, self._space, self._disks = host, space, disks
        self._kernel, self._faults, self._process = host.kernel, host.faults, host.process
        self._random = host.kernel.random.random
        self.url = f"sim://{space.name}"
        self.atomic_create = atomic_create

    # --- the contract -------------------------------------------------------------------------------------------

    def create(self, key: str, data: bytes) -> bool:
        seen = self.atomic_create or key not in self._space.objects
        if self._space.asked is not None:
            self._space.asked(key, self._host)

        def effect() -> bool:
            if key in self._space.objects and (self.atomic_create or not seen):
                return self._space.objects[key] == data
            self._change(key, data)
            return True

        return self._do("create", key, effect)

    def put(self, key: str, data: bytes) -> None:
        self._do("put", key, lambda: self._change(key, data))

    def put_file(self, key: str, path: Path, *, progress: Callable[[int], None] | None = None) -> None:
        _, _, disk, name = str(path).split("/", 3)
        data = self._disks[disk].objects.get(name)
        if data is None:
            raise StoreError("put_file", key, f"the local file {path} cannot be read")
        self._do("put_file", key, lambda: self._change(key, data), data=data)
        if progress:
            progress(len(data))

    def get(self, key: str, *, max_nbytes: int) -> bytes:
        data = self._do("get", key, lambda: found(self._space, "get", key))
        check_limit(key, len(data), max_nbytes)
        return data

    def read(self, key: str, begin: int, end: int) -> bytes:
        return self._do("read", key, lambda: part(self._space, key, begin, end))

    def list(self, prefix: str) -> list[Entry]:
        return self._do("list", prefix, lambda: self._space.entries(prefix))

    def size(self, key: str) -> int:
        return self._do("size", key, lambda: len(found(self._space, "size", key)))

    def delete(self, key: str) -> None:
        self._do("delete", key, lambda: self._change(key, None))

    def remove_unfinished(self, before: str | float, *, dry_run: bool = False) -> int:
        """Nothing is visible before it is finished here, and nothing stays: only the call itself can fail."""
        self._do("list", str(before), lambda: None)
        return 0

    # --- inside -------------------------------------------------------------------------------------------------

    def _change(self, key: str, data: bytes | None) -> None:
        self._space.change(key, data, self._host)

    def _do(self, operation: str, key: str, effect: Callable[[], T], *, data: bytes = b"") -> T:
        raise NotImplementedError

    def _timely(self, effect: Callable[[], T], seconds: float) -> T:
        if self._random() < 0.5:
            self._kernel.wait(seconds)
            return effect()
        result = effect()
        self._kernel.wait(seconds)
        return result


_CATEGORIES = {
    "get": "read", "read": "read", "size": "read", "list": "list", "create": "create", "put": "put", "put_file": "put",
    "delete": "delete",
}  # fmt: skip
_OF_RECOVERY = frozenset({
    "remote.put_file data", "remote.size data", "remote.read data", "remote.create manifests", "remote.get manifests",
    "remote.create layouts", "remote.put layouts", "remote.size layouts", "remote.read layouts",
})  # fmt: skip
"""Calls that a job makes before it owns the run root only when it finishes an upload."""

_WRITES = frozenset({"create", "put", "delete"})


class RemoteStore(SimStore):
    """The run root."""

    def _do(self, operation: str, key: str, effect: Callable[[], T], *, data: bytes = b"") -> T:
        if self._process.dead:
            raise Killed
        category = _CATEGORIES[operation]
        label = f"remote.{operation} {folder(key)}"
        self._host.at_switch(label)
        if self._host.request is not None and category in _WRITES:
            self._host.send(label, effect)
            raise StoreUnavailableError(operation, key, "simulated: no answer")
        if self._host.refuses_upload and operation == "put_file":
            raise StoreFullError(operation, key, "simulated: this one is refused")
        recovers = self._host.epoch == NO_EPOCH and label in _OF_RECOVERY
        fault = self._faults.strike("recovery" if recovers else category, label)
        if fault is None:
            return self._timely(effect, self._random() * 0.02 * self._process.slowness)
        if fault in {"crash", "freeze", "host-down"}:
            return self._host.fall(fault, label, effect, 0.01, in_flight=category in _WRITES)
        self._kernel.note(f"{label}: {fault}")
        return self._failed(fault, operation, key, effect, data)

    def _failed(self, fault: str, operation: str, key: str, effect: Callable[[], T], data: bytes) -> T:
        answer: Any
        match fault:
            case "late" | "late-lost":
                return self._late(operation, key, effect, lost=fault == "late-lost")
            case "slow":
                return self._timely(effect, 0.2 + self._random() * 3.0)
            case "lost":
                effect()
            case "never":
                self._kernel.wait(600.0 if self._random() < 0.3 else 3.0 + self._random() * 9.0)
            case "truncated":
                answer = self._truncated(key, data) if operation == "put_file" else self._timely(effect, 0.01)
                return answer  # type: ignore[no-any-return]
            case "exists":
                answer = self._timely(effect, 0.01) and False
                return answer  # type: ignore[no-any-return]
            case "stale":
                answer = self._space.entries_at(key, self._kernel.now - self._random() * LAG_S)
                self._kernel.wait(0.01)
                return answer  # type: ignore[no-any-return]
        self._kernel.wait(self._random() * 0.05)
        if fault == "permanent":
            kind = StoreAccessError if self._random() < 0.5 else StoreError
            raise kind(operation, key, "simulated: no")
        raise (StoreFullError if fault == "full" else StoreUnavailableError)(operation, key, f"simulated: {fault}")

    def _late(self, operation: str, key: str, effect: Callable[[], T], *, lost: bool) -> T:
        """The request goes on for a while; it takes effect at the end, whoever still waits for it or lives."""
        seconds = 2.0 + self._random() * 12.0
        answer: list[T] = []
        error: list[StoreError] = []

        def land() -> None:
            self._kernel.note(f"late {operation} lands", key)
            try:
                answer.append(effect())
            except StoreError as err:
                error.append(err)

        self._kernel.at(seconds, land)
        self._kernel.wait(seconds + 0.001)
        if error:
            raise error[0]
        if lost:
            raise StoreUnavailableError(operation, key, "simulated: no answer")
        return answer[0]

    def _truncated(self, key: str, data: bytes) -> None:
        self._timely(lambda: self._change(key, data[: int(len(data) * self._random())]), 0.01)


class LocalStore(SimStore):
    """A node's disk."""

    def _do(self, operation: str, key: str, effect: Callable[[], T], *, data: bytes = b"") -> T:
        if self._process.dead:
            raise Killed
        writes = _CATEGORIES[operation] in _WRITES
        label = f"local.{operation} {folder(key)}"
        self._host.at_switch(label)
        fault = self._faults.strike("disk-write" if writes else "disk-read", label)
        if fault is None:
            return self._timely(effect, self._random() * 0.002 * self._process.slowness)
        if fault in {"crash", "freeze", "host-down"}:
            return self._host.fall(fault, label, effect, 0.002)
        self._kernel.note(f"{label}: {fault}")
        if fault == "slow":
            return self._timely(effect, self._random() * 0.5)
        self._kernel.wait(self._random() * 0.01)
        raise (StoreFullError if fault == "full" else StoreUnavailableError)(operation, key, f"simulated: {fault}")


def found(space: Space, operation: str, key: str) -> bytes:
    """An object's bytes."""
    data = space.objects.get(key)
    if data is None:
        raise StoreNotFoundError(operation, key, "there is no such object")
    return data


def part(space: Space, key: str, begin: int, end: int) -> bytes:
    """Some of an object's bytes."""
    data = found(space, "read", key)
    check_end(key, len(data), end)
    return data[begin:end]


def folder(key: str) -> str:
    """What kind of object a key names."""
    if key.startswith("manifests/epochs/"):
        return "inheritance" if key.endswith(".inherited.json") else "epochs"
    return key.split("/", 1)[0]
