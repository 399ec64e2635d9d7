"""The three ways to move bytes through fsspec, each with the cautions its kind of server needs.

The only module that loads fsspec, s3fs and botocore, and only when a store is made. Paths are fsspec's, errors are
the libraries' own.
"""

from __future__ import annotations

import contextlib
import errno
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from dcpsvc.storage.names import temp_name
from dcpsvc.storage.remoteerror import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from pathlib import Path

_S3 = frozenset({"s3", "s3a"})
_WHOLE_PUT = frozenset({"abfs", "abfss", "adl", "az", "gcs", "gs", "oci", "oss", "tos"})
"""Protocols beside S3 whose objects appear whole or not at all, and that have no directories."""

_CALL_S = 180.0
"""No S3 call may take longer, not even with a server that accepts a connection and then says nothing."""
_SLOWEST_NBYTES_PER_S = 2**20
_PART_NBYTES = 32 * 2**20
_MAX_PARTS = 10_000
_MAX_CREATE_NBYTES = 32 * 2**20
_PRECONDITION_FAILED = 412

_S3_CONFIG: Mapping[str, object] = {
    "connect_timeout": 5,
    "read_timeout": 30,
    "max_pool_connections": 32,
    # Inside one call, so that one bad part does not send a whole shard again; RetryingStore goes around the call.
    "retries": {"mode": "standard", "total_max_attempts": 4},
}


class Wire(Protocol):
    """What an object store needs of an fsspec file system. Every method may raise anything."""

    atomic_create: bool

    def create(self, path: str, data: bytes) -> bool:
        """Write a new object; False if there is one."""
        ...

    def put(self, path: str, data: bytes) -> None:
        """Write an object, all or nothing."""
        ...

    def put_file(self, path: str, source: Path, nbytes: int, sent: Callable[[int], None]) -> None:
        """Write a file's bytes, all or nothing; ``sent`` hears how many are gone in total."""
        ...

    def read(self, path: str, begin: int, end: int) -> bytes:
        """Read bytes ``[begin, end)``, fewer where the object is shorter."""
        ...

    def size(self, path: str) -> int:
        """Bytes of an object; FileNotFoundError where there is none."""
        ...

    def listing(self, root: str, prefix: str) -> Iterator[tuple[str, int]]:
        """Paths and sizes of all objects below ``root/prefix``; nothing where nobody has written."""
        ...

    def delete(self, path: str) -> None:
        """Remove an object; FileNotFoundError is a fine answer where there is none."""
        ...


def open_wire(url: str, options: Mapping[str, Any]) -> tuple[Wire, str]:
    """The wire for a URL, and the run root as a path on it. Nothing is sent yet for S3."""
    protocol = url.partition("://")[0]
    # By name: fsspec ships no types, and whoever only lists a local run root must not pay for loading it.
    core: Any = import_module("fsspec.core")
    kind: type[BlobWire] = FileWire
    if protocol in _S3:
        kind, options = S3Wire, _s3_options(options)
    elif protocol in _WHOLE_PUT:
        kind, options = BlobWire, {**options, "use_listings_cache": False}
    fs, root = core.url_to_fs(url, skip_instance_cache=True, **options)
    return kind(fs), cast("str", root).rstrip("/")


class BlobWire:
    """Objects that appear whole when their upload ends: no directories, no renames."""

    atomic_create = False

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def create(self, path: str, data: bytes) -> bool:
        """See :class:`Wire`; looks first, so two racing callers may both be told True."""
        # Not fs.exists: it says False to every failure.
        with contextlib.suppress(FileNotFoundError):
            self.size(path)
            return False
        self.put(path, data)
        return True

    def put(self, path: str, data: bytes) -> None:
        """See :class:`Wire`."""
        self._fs.pipe_file(path, data, **self._within(len(data)))

    def put_file(self, path: str, source: Path, nbytes: int, sent: Callable[[int], None]) -> None:
        """See :class:`Wire`."""
        self._fs.put_file(str(source), path, callback=_callback(sent), **self._within(nbytes))

    def read(self, path: str, begin: int, end: int) -> bytes:
        """See :class:`Wire`."""
        return cast("bytes", self._fs.cat_file(path, start=begin, end=end, **self._within(end - begin)))

    def size(self, path: str) -> int:
        """See :class:`Wire`."""
        self._fs.invalidate_cache(path.rpartition("/")[0])
        info: dict[str, Any] = self._fs.info(path, **self._within(0))
        if info["type"] == "directory":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return int(info["size"])

    def listing(self, root: str, prefix: str) -> Iterator[tuple[str, int]]:
        """See :class:`Wire`."""
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            yield from _files(self._fs.find(f"{root}/{prefix}", detail=True))

    def delete(self, path: str) -> None:
        """See :class:`Wire`."""
        self._fs.rm_file(path, **self._within(0))

    def _within(self, nbytes: int) -> dict[str, Any]:
        """Options that bound one call."""
        del nbytes
        return {}


class S3Wire(BlobWire):
    """S3 through s3fs: conditional PUT, one LIST a listing, parts of 32 MiB, and a limit on every call."""

    atomic_create = True

    def __init__(self, fs: Any) -> None:
        super().__init__(fs)
        # s3fs's own loop around botocore's would multiply every timeout by five.
        fs.retries = 1

    def create(self, path: str, data: bytes) -> bool:
        """See :class:`Wire`; a single PUT, the only conditional write that S3 servers agree about."""
        if len(data) > _MAX_CREATE_NBYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        try:
            self._fs.pipe_file(path, data, mode="create", chunksize=_MAX_CREATE_NBYTES, **self._within(len(data)))
        except OSError as err:
            # FileExistsError only where the server names the condition that failed; AWS does, Ceph does not.
            answer = answer_of(err)
            if isinstance(err, FileExistsError) or (answer and answer.status == _PRECONDITION_FAILED):
                return False
            raise
        return True

    def put_file(self, path: str, source: Path, nbytes: int, sent: Callable[[int], None]) -> None:
        """See :class:`Wire`."""
        part = max(_PART_NBYTES, -(-nbytes // _MAX_PARTS))
        self._fs.put_file(str(source), path, callback=_callback(sent), chunksize=part, **self._within(nbytes))

    def listing(self, root: str, prefix: str) -> Iterator[tuple[str, int]]:
        """See :class:`Wire`; here FileNotFoundError means that there is no such bucket, so it is raised."""
        if prefix:
            # With a prefix s3fs asks once; without, an empty answer costs two more requests.
            yield from _files(self._fs.find(root, prefix=prefix, detail=True, **self._within(0)))
        else:
            yield from _files(self._fs.find(root, detail=True, **self._within(0)))

    def _within(self, nbytes: int) -> dict[str, Any]:
        return {"timeout": _CALL_S + nbytes / _SLOWEST_NBYTES_PER_S}


class FileWire(BlobWire):
    """A file system behind fsspec: directories are made, and files are written aside and moved to their name."""

    def put(self, path: str, data: bytes) -> None:
        """See :class:`Wire`."""
        with self._aside(path) as temp:
            self._fs.pipe_file(temp, data)

    def put_file(self, path: str, source: Path, nbytes: int, sent: Callable[[int], None]) -> None:
        """See :class:`Wire`."""
        with self._aside(path) as temp:
            super().put_file(temp, source, nbytes, sent)

    def read(self, path: str, begin: int, end: int) -> bytes:
        """See :class:`Wire`."""
        with _directory_is_no_object():
            return super().read(path, begin, end)

    def delete(self, path: str) -> None:
        """See :class:`Wire`."""
        with _directory_is_no_object():
            super().delete(path)

    def listing(self, root: str, prefix: str) -> Iterator[tuple[str, int]]:
        """See :class:`Wire`; walked here, since fsspec's own walk takes every failure for an empty directory."""
        self._fs.invalidate_cache()
        yield from self._walk(f"{root}/{prefix}".rstrip("/"))

    def _walk(self, folder: str) -> Iterator[tuple[str, int]]:
        try:
            found: list[dict[str, Any]] = self._fs.ls(folder, detail=True)
        except FileNotFoundError:
            return
        for info in found:
            name = str(info["name"])
            if name.strip("/") == folder.strip("/"):
                # How fsspec lists a file.
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if info["type"] == "directory":
                yield from self._walk(name.rstrip("/"))
            elif info["type"] == "file":
                yield name, int(info["size"])

    @contextlib.contextmanager
    def _aside(self, path: str) -> Generator[str]:
        parent = path.rpartition("/")[0]
        temp = f"{parent}/{temp_name()}"
        self._fs.makedirs(parent, exist_ok=True)
        try:
            yield temp
            self._fs.mv(temp, path)
        except BaseException:
            # A temporary name that stays is never listed, and must not hide what went wrong before.
            with contextlib.suppress(Exception):
                self._fs.rm_file(temp)
            raise


@contextlib.contextmanager
def _directory_is_no_object() -> Generator[None]:
    try:
        yield
    except IsADirectoryError as err:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from err


def _s3_options(options: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {**_S3_CONFIG, **(options.get("config_kwargs") or {})}
    # Listings are never cached: a rank must see what another one wrote a moment ago.
    return {**options, "config_kwargs": config, "use_listings_cache": False}


def _files(found: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    for name, info in found.items():
        if info["type"] != "directory":
            yield name, int(info["size"])


def _callback(sent: Callable[[int], None]) -> object:
    def hook(_size: int, value: int, **_: object) -> None:
        sent(value)

    callbacks: Any = import_module("fsspec.callbacks")
    return callbacks.Callback(hooks={"dcpsvc": hook})
