"""A store in this process's memory, for tests and for experiments in one process."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from dcpsvc.errors import StoreNotFoundError
from dcpsvc.storage.base import Entry
from dcpsvc.storage.names import check_key, check_prefix
from dcpsvc.storage.oserror import local_file_error
from dcpsvc.storage.ranges import check_end, check_limit, check_range

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class _Space:
    """All objects of one name. Outlives the stores that look at it, as a bucket outlives its clients."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()


_spaces: dict[str, _Space] = {}
_spaces_lock = threading.Lock()


class MemoryStore:
    """Objects in this process's memory. Two stores with one name show the same objects."""

    def __init__(self, name: str) -> None:
        self._url = f"memory://{name}"
        with _spaces_lock:
            self._space = _spaces.setdefault(name, _Space())

    def __repr__(self) -> str:
        return f"MemoryStore({self._url!r})"

    @property
    def url(self) -> str:
        """Where this is, as :func:`~dcpsvc.storage.open.open_store` takes it."""
        return self._url

    @property
    def atomic_create(self) -> bool:
        """Always."""
        return True

    def create(self, key: str, data: bytes) -> bool:
        """See :meth:`Store.create <dcpsvc.storage.base.Store.create>`."""
        check_key("create", key)
        with self._space.lock:
            if key in self._space.objects:
                return False
            self._space.objects[key] = bytes(data)
            return True

    def put(self, key: str, data: bytes) -> None:
        """See :meth:`Store.put <dcpsvc.storage.base.Store.put>`."""
        check_key("put", key)
        with self._space.lock:
            self._space.objects[key] = bytes(data)

    def put_file(self, key: str, path: Path, *, progress: Callable[[int], None] | None = None) -> None:
        """See :meth:`Store.put_file <dcpsvc.storage.base.Store.put_file>`."""
        check_key("put_file", key)
        try:
            data = path.read_bytes()
        except OSError as err:
            raise local_file_error(self._where(key), path, err) from err
        self.put(key, data)
        if progress and data:
            progress(len(data))

    def get(self, key: str, *, max_nbytes: int) -> bytes:
        """See :meth:`Store.get <dcpsvc.storage.base.Store.get>`."""
        data = self._object("get", key)
        check_limit(self._where(key), len(data), max_nbytes)
        return data

    def read(self, key: str, begin: int, end: int) -> bytes:
        """See :meth:`Store.read <dcpsvc.storage.base.Store.read>`."""
        check_range(self._where(key), begin, end)
        data = self._object("read", key)
        check_end(self._where(key), len(data), end)
        return data[begin:end]

    def list(self, prefix: str) -> list[Entry]:
        """See :meth:`Store.list <dcpsvc.storage.base.Store.list>`."""
        check_prefix("list", prefix)
        with self._space.lock:
            return sorted(Entry(k, len(v)) for k, v in self._space.objects.items() if k.startswith(prefix))

    def size(self, key: str) -> int:
        """See :meth:`Store.size <dcpsvc.storage.base.Store.size>`."""
        return len(self._object("size", key))

    def delete(self, key: str) -> None:
        """See :meth:`Store.delete <dcpsvc.storage.base.Store.delete>`."""
        check_key("delete", key)
        with self._space.lock:
            self._space.objects.pop(key, None)

    def remove_unfinished(self, before: str | float, *, dry_run: bool = False) -> int:
        """Nothing here is ever unfinished."""
        del dry_run
        if isinstance(before, str):
            check_key("remove_unfinished", before)
        return 0

    def _object(self, operation: str, key: str) -> bytes:
        check_key(operation, key)
        with self._space.lock:
            data = self._space.objects.get(key)
        if data is None:
            raise StoreNotFoundError(operation, self._where(key), "there is no such object")
        return data

    def _where(self, key: str) -> str:
        return f"{self._url}/{key}"
