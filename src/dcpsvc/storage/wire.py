"""The ways to move bytes through fsspec, each with the cautions its kind of server needs.

fsspec and what is below it are loaded only when a store is made. Paths are fsspec's, errors are
the libraries' own.
"""

from __future__ import annotations

import contextlib
import errno
import os
from datetime import datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from dcpsvc.storage.cargo import Carried

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from dcpsvc.config import Limits
    from dcpsvc.storage.base import Credentials
    from dcpsvc.storage.cargo import Cargo

_S3 = frozenset({"s3", "s3a"})
_WHOLE_PUT = frozenset({"abfs", "abfss", "adl", "az", "gcs", "gs", "oci", "oss", "tos"})
"""Protocols beside S3 whose objects appear whole or not at all, and that have no directories."""


class Wire(Protocol):
    """What an object store needs of an fsspec file system. Every method may raise anything."""

    atomic_create: bool
    copies: bool

    def create(self, path: str, data: bytes) -> bool:
        """Write a new object; False if there is one."""
        ...

    def put(self, path: str, data: bytes) -> None:
        """Write an object, all or nothing."""
        ...

    def put_file(self, path: str, cargo: Cargo, nbytes: int) -> Carried:
        """Write a file's bytes, all or nothing.

        Args:
            path: Where to.
            cargo: The file; ``earlier`` names a path.
            nbytes: Its size.
        """
        ...

    def read(self, path: str, begin: int, end: int) -> bytes:
        """Read bytes ``[begin, end)``, fewer where the object is shorter."""
        ...

    def read_into(self, path: str, begin: int, views: Sequence[memoryview]) -> int:
        """Fill ``views`` with the bytes from ``begin`` on; how many there were."""
        ...

    def read_rest(self, path: str, begin: int, max_nbytes: int) -> tuple[int, bytes]:
        """The size of an object, and its bytes from ``begin`` on; no bytes if they are more than ``max_nbytes``."""
        ...

    def size(self, path: str) -> int:
        """Bytes of an object; FileNotFoundError where there is none."""
        ...

    def is_file(self, path: str) -> bool:
        """Whether there is an object, or a file, of that very name; FileNotFoundError is a fine answer."""
        ...

    def listing(self, root: str, prefix: str) -> Iterator[tuple[str, int]]:
        """Paths and sizes of all objects below ``root/prefix``; nothing where nobody has written."""
        ...

    def page(self, root: str, prefix: str, after: str) -> tuple[list[tuple[str, int]], str]:
        """What one request tells of a listing, and what the next one begins after; empty at both ends."""
        ...

    def delete(self, path: str) -> None:
        """Remove an object; FileNotFoundError is a fine answer where there is none."""
        ...

    def credentials(self) -> Credentials | None:
        """What the client signs with; None where it does not say."""
        ...

    def written_s(self, path: str) -> float | None:
        """When an object was written, by the server's clock, in seconds since 1970; None if it does not say."""
        ...

    def remove_unfinished(self, root: str, before_s: float, *, dry_run: bool) -> int:
        """See :meth:`Store.remove_unfinished <dcpsvc.storage.base.Store.remove_unfinished>`."""
        ...


def open_wire(url: str, options: Mapping[str, Any], limits: Limits, stop: threading.Event) -> tuple[Wire, str]:
    """The wire for a URL, and the run root as a path on it. Nothing is sent yet for S3."""
    protocol = url.partition("://")[0]
    if protocol in _S3:
        from dcpsvc.storage.s3client import client
        from dcpsvc.storage.s3wire import S3Wire, s3_options

        found, root = client(url, s3_options(options, limits))
        return S3Wire(found, limits, stop), root
    if protocol in _WHOLE_PUT:
        fs, root = _file_system(url, {**options, "use_listings_cache": False})
        return BlobWire(fs), root
    from dcpsvc.storage.filewire import FileWire

    fs, root = _file_system(url, options)
    return FileWire(fs), root


def _file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    # By name: fsspec ships no types, and whoever only lists a local run root must not pay for loading it.
    core: Any = import_module("fsspec.core")
    fs, root = core.url_to_fs(url, skip_instance_cache=True, **options)
    return fs, cast("str", root).rstrip("/")


class BlobWire:
    """Objects that appear whole when their upload ends: no directories, no renames."""

    atomic_create = False
    copies = False

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

    def put_file(self, path: str, cargo: Cargo, nbytes: int) -> Carried:
        """See :class:`Wire`; proves nothing."""
        sent = _Sent(cargo.progress)
        self._fs.put_file(str(cargo.path), path, callback=_callback(sent.upto), **self._within(nbytes))
        sent.upto(nbytes)  # some copy without reporting anything
        return Carried(proven=False)

    def read(self, path: str, begin: int, end: int) -> bytes:
        """See :class:`Wire`."""
        return cast("bytes", self._fs.cat_file(path, start=begin, end=end, **self._within(end - begin)))

    def read_into(self, path: str, begin: int, views: Sequence[memoryview]) -> int:
        """See :class:`Wire`; by a copy."""
        data = memoryview(self.read(path, begin, begin + sum(map(len, views))))
        at = 0
        for view in views:
            part = data[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)
        return at

    def read_rest(self, path: str, begin: int, max_nbytes: int) -> tuple[int, bytes]:
        """See :class:`Wire`; in two requests."""
        nbytes = self.size(path)
        return nbytes, self.read(path, begin, nbytes) if 0 < nbytes - begin <= max_nbytes else b""

    def size(self, path: str) -> int:
        """See :class:`Wire`."""
        self._fs.invalidate_cache(path.rpartition("/")[0])
        info: dict[str, Any] = self._fs.info(path, **self._within(0))
        if info["type"] == "directory":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return int(info["size"])

    def is_file(self, path: str) -> bool:
        """See :class:`Wire`."""
        return self.size(path) >= 0

    def listing(self, root: str, prefix: str) -> Iterator[tuple[str, int]]:
        """See :class:`Wire`."""
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            yield from files(self._fs.find(f"{root}/{prefix}", detail=True))

    def page(self, root: str, prefix: str, after: str) -> tuple[list[tuple[str, int]], str]:
        """See :class:`Wire`; everything: pages are the library's business."""
        del after
        return list(self.listing(root, prefix)), ""

    def delete(self, path: str) -> None:
        """See :class:`Wire`."""
        self._fs.rm_file(path, **self._within(0))

    def credentials(self) -> Credentials | None:
        """See :class:`Wire`."""
        return None

    def written_s(self, path: str) -> float | None:
        """See :class:`Wire`."""
        try:
            written = self._fs.modified(path)
        except NotImplementedError:
            return None
        return written.timestamp() if isinstance(written, datetime) else None

    def remove_unfinished(self, root: str, before_s: float, *, dry_run: bool) -> int:
        """See :class:`Wire`; nothing: how such servers name what is unfinished, fsspec does not say."""
        del root, before_s, dry_run
        return 0

    def _within(self, nbytes: int) -> dict[str, Any]:
        """Options that bound one call."""
        del nbytes
        return {}


def files(found: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    """What of a listing is an object, and its size."""
    for name, info in found.items():
        if info["type"] != "directory":
            yield name, int(info["size"])


class _Sent:
    """Turns "so many bytes are gone" into "so many more"."""

    def __init__(self, progress: Callable[[int], None] | None) -> None:
        self._progress, self._nbytes = progress, 0

    def upto(self, nbytes: int) -> None:
        more, self._nbytes = nbytes - self._nbytes, max(nbytes, self._nbytes)
        if self._progress and more > 0:
            self._progress(more)


def _callback(sent: Callable[[int], None]) -> object:
    def hook(_size: int, value: int, **_: object) -> None:
        sent(value)

    callbacks: Any = import_module("fsspec.callbacks")
    return callbacks.Callback(hooks={"dcpsvc": hook})
