"""A run root behind any fsspec URL: S3 first, then whatever fsspec has an implementation for."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from dcpsvc.config import Limits
from dcpsvc.errors import StoreAccessError, StoreNotFoundError, StoreUnavailableError
from dcpsvc.storage.base import Entry
from dcpsvc.storage.cargo import Cargo
from dcpsvc.storage.conflict import holds
from dcpsvc.storage.names import check_key, check_prefix, is_temp, redact
from dcpsvc.storage.oserror import local_file_error
from dcpsvc.storage.paging import Page
from dcpsvc.storage.ranges import check_end, check_length, check_limit, check_range
from dcpsvc.storage.remoteerror import from_remote_error, secrets_in
from dcpsvc.storage.wire import open_wire

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from dcpsvc.storage.base import Credentials
    from dcpsvc.storage.cargo import Carried


class ObjectStore:
    """Objects behind an fsspec URL, such as ``s3://bucket/run``.

    Args:
        url: Of the run root.
        storage_options: For fsspec.
        limits: How hard to work the server.
        stop: Once set, nothing is tried again.

    On S3 :meth:`create` says True as well where the stored bytes are exactly ``data``: the answer to our own write
    may have been lost. Buckets are never created. On file systems behind fsspec (sftp, smb, ...) nothing is synced:
    durable means what that server means by it.
    """

    distant = True
    """Requests are better made side by side, for each waits for the network."""

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, Any] | None = None,
        *,
        limits: Limits | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        options = dict(storage_options or {})
        self._url = redact(url).rstrip("/")
        self._secrets = [*secrets_in(options), *_passwords_in(url)]
        with self._translated("open", ""):
            self._wire, self._root = open_wire(url, options, limits or Limits(), stop or threading.Event())

    def __repr__(self) -> str:
        return f"ObjectStore({self._url!r})"

    @property
    def url(self) -> str:
        """The URL without user name and password."""
        return self._url

    @property
    def atomic_create(self) -> bool:
        """Whether the protocol can do it; only a probe can tell whether the server does (Swift's S3 does not)."""
        return self._wire.atomic_create

    @property
    def copies(self) -> bool:
        """Whether the protocol can copy a part of one object into another."""
        return self._wire.copies

    def create(self, key: str, data: bytes) -> bool:
        """See :meth:`Store.create <dcpsvc.storage.base.Store.create>`; at most 32 MiB."""
        path = self._path("create", key)
        with self._translated("create", key):
            created = self._wire.create(path, data)
        return created or (self.atomic_create and holds(self, key, data))

    def put(self, key: str, data: bytes) -> None:
        """See :meth:`Store.put <dcpsvc.storage.base.Store.put>`."""
        path = self._path("put", key)
        with self._translated("put", key):
            self._wire.put(path, data)

    def put_file(self, key: str, path: Path, *, progress: Callable[[int], None] | None = None) -> None:
        """See :meth:`Store.put_file <dcpsvc.storage.base.Store.put_file>`."""
        self.carry(key, Cargo(path=path, progress=progress))

    def carry(self, key: str, cargo: Cargo) -> Carried:
        """See :meth:`ProvingStore.carry <dcpsvc.storage.base.ProvingStore.carry>`."""
        target, where = self._path("put_file", key), self._where(key)
        nbytes = _local_size(where, cargo.path)
        if earlier := cargo.earlier:
            cargo = replace(cargo, earlier=earlier._replace(key=self._path("put_file", earlier.key)))
        with self._translated("put_file", key):
            carried = self._wire.put_file(target, cargo, nbytes)
        if not carried.proven:
            check_length("put_file", where, self._size("put_file", key), nbytes)
        return carried

    def get(self, key: str, *, max_nbytes: int) -> bytes:
        """See :meth:`Store.get <dcpsvc.storage.base.Store.get>`."""
        return self._rest("get", key, 0, max_nbytes)[1]

    def read(self, key: str, begin: int, end: int) -> bytes:
        """See :meth:`Store.read <dcpsvc.storage.base.Store.read>`."""
        check_range(self._where(key), begin, end)
        if begin == end:
            check_end(self._where(key), self._size("read", key), end)
        return self._range("read", key, begin, end)

    def read_into(self, key: str, begin: int, views: Sequence[memoryview]) -> None:
        """See :meth:`ScatteringStore.read_into <dcpsvc.storage.base.ScatteringStore.read_into>`."""
        path, where = self._path("read", key), self._where(key)
        wanted = sum(map(len, views))
        if not wanted:
            return
        with self._translated("read", key):
            found = self._wire.read_into(path, begin, views)
        if found < wanted:
            check_end(where, self._size("read", key), begin + wanted)
            raise _cut_short("read", where, found, wanted)

    def read_rest(self, key: str, begin: int, *, max_nbytes: int) -> tuple[int, bytes]:
        """See :class:`RestReadingStore <dcpsvc.storage.base.RestReadingStore>`."""
        return self._rest("read", key, begin, max_nbytes)

    def list(self, prefix: str) -> list[Entry]:
        """See :meth:`Store.list <dcpsvc.storage.base.Store.list>`; lists that prefix only, and never from a cache."""
        check_prefix("list", prefix)
        with self._translated("list", prefix):
            found = list(self._wire.listing(self._root, prefix))
        return sorted(self._entries(found, prefix))

    def list_page(self, prefix: str, after: str) -> Page:
        """See :meth:`PagingStore.list_page <dcpsvc.storage.paging.PagingStore.list_page>`."""
        check_prefix("list", prefix)
        with self._translated("list", prefix):
            found, after = self._wire.page(self._root, prefix, after)
        return Page([*self._entries(found, prefix)], after)

    def is_file(self) -> bool:
        """See :class:`PlacedStore <dcpsvc.storage.placed.PlacedStore>`. One request."""
        try:
            with self._translated("size", ""):
                return self._wire.is_file(self._root)
        except (StoreNotFoundError, StoreAccessError):
            return False

    def size(self, key: str) -> int:
        """See :meth:`Store.size <dcpsvc.storage.base.Store.size>`."""
        return self._size("size", key)

    def delete(self, key: str) -> None:
        """See :meth:`Store.delete <dcpsvc.storage.base.Store.delete>`."""
        path = self._path("delete", key)
        with contextlib.suppress(StoreNotFoundError), self._translated("delete", key):
            self._wire.delete(path)

    def credentials(self) -> Credentials | None:
        """See :meth:`SigningStore.credentials <dcpsvc.storage.base.SigningStore.credentials>`."""
        with self._translated("credentials", ""):
            return self._wire.credentials()

    def written_s(self, key: str) -> float | None:
        """See :meth:`DatingStore.written_s <dcpsvc.storage.base.DatingStore.written_s>`."""
        path = self._path("written", key)
        with self._translated("written", key):
            return self._wire.written_s(path)

    def remove_unfinished(self, before: str | float, *, dry_run: bool = False) -> int:
        """See :meth:`Store.remove_unfinished <dcpsvc.storage.base.Store.remove_unfinished>`; on S3: multipart."""
        with self._translated("remove_unfinished", ""):
            limit = self._wire.written_s(self._path("remove_unfinished", before)) if isinstance(before, str) else before
            return 0 if limit is None else self._wire.remove_unfinished(self._root, limit, dry_run=dry_run)

    def _size(self, operation: str, key: str) -> int:
        path = self._path(operation, key)
        with self._translated(operation, key):
            return self._wire.size(path)

    def _rest(self, operation: str, key: str, begin: int, max_nbytes: int) -> tuple[int, bytes]:
        path = self._path(operation, key)
        with self._translated(operation, key):
            nbytes, data = self._wire.read_rest(path, begin, max_nbytes)
        if operation == "get":
            check_limit(self._where(key), nbytes, max_nbytes)
        wanted = nbytes - begin if nbytes - begin <= max_nbytes else 0
        if len(data) < wanted:
            raise _cut_short(operation, self._where(key), len(data), wanted)
        return nbytes, data

    def _range(self, operation: str, key: str, begin: int, end: int) -> bytes:
        path, where = self._path(operation, key), self._where(key)
        if begin == end:
            return b""
        with self._translated(operation, key):
            data = self._wire.read(path, begin, end)
        if len(data) < end - begin:
            # A short answer is either a short object or a broken connection; only the size can tell.
            check_end(where, self._size(operation, key), end)
            raise _cut_short(operation, where, len(data), end - begin)
        check_length(operation, where, len(data), end - begin)
        return data

    @contextlib.contextmanager
    def _translated(self, operation: str, key: str) -> Generator[None]:
        try:
            yield
        except Exception as err:  # every library below has an error tree of its own, and some raise bare Exceptions
            translated = from_remote_error(operation, self._where(key), err, self._secrets)
            if translated is err:
                raise
            raise translated from err

    def _entries(self, found: Iterable[tuple[str, int]], prefix: str) -> Iterator[Entry]:
        entries = (self._entry(name, nbytes) for name, nbytes in found)
        return (entry for entry in entries if entry and entry.key.startswith(prefix))

    def _entry(self, name: str, nbytes: int) -> Entry | None:
        # fsspec's file systems disagree about a leading slash.
        key = name.strip("/").removeprefix(self._root.strip("/")).lstrip("/")
        # A name that ends in "/" is a console's idea of an empty folder.
        if not key or name.endswith("/") or is_temp(key.rpartition("/")[2]):
            return None
        return Entry(key, nbytes)

    def _path(self, operation: str, key: str) -> str:
        check_key(operation, key)
        return f"{self._root}/{key}"

    def _where(self, key: str) -> str:
        return f"{self._url}/{key}" if key else self._url


def _cut_short(operation: str, where: str, found: int, wanted: int) -> StoreUnavailableError:
    """The object has the bytes, and the answer had not."""
    return StoreUnavailableError(operation, where, f"{found} bytes came where {wanted} were expected")


def _local_size(where: str, path: Path) -> int:
    try:
        with path.open("rb") as file:
            return file.seek(0, 2)
    except OSError as err:
        raise local_file_error(where, path, err) from err


def _passwords_in(url: str) -> list[str]:
    password = urlsplit(url).password
    return [password, unquote(password)] if password else []
