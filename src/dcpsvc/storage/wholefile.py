"""Files that are proven as a whole: those of a checkpoint's folder of PEFT, which cannot carry a block table."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

import xxhash

from dcpsvc.errors import CorruptShardError, StoreError, StoreNotFoundError
from dcpsvc.format.adapter import AdapterFile
from dcpsvc.storage import posixfile
from dcpsvc.storage.base import stream
from dcpsvc.storage.oserror import from_os_error

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path
    from typing import BinaryIO

    from dcpsvc.storage.base import ReadableStore, Store


class Writer:
    """A new file, hashed on the way. One thread at a time, but for :meth:`close`.

    A thread may be left behind in a call that hangs: the file stays open as long, so that no other gets its number.

    Args:
        path: Where to; what a killed process left there is lost.
        key: Run-relative key of the file.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._file: BinaryIO | None = None
        self._hashed, self._nbytes = xxhash.xxh3_128(), 0
        self._lock = threading.Lock()
        self._busy = self._unwanted = False

    def write(self, part: bytes | memoryview) -> None:
        """More of it.

        Raises:
            StoreError: The disk does not take it, or the file is closed.
        """
        with self._working():
            if self._file is None:
                posixfile.make_directory(self._path.parent)
                self._file = self._path.open("wb")
            self._hashed.update(part)
            posixfile.write_all(self._file.fileno(), part)
        self._nbytes += len(part)

    def finish(self) -> AdapterFile:
        """Durable when this returns.

        Raises:
            StoreError: The disk does not take it, or the file is closed.
        """
        with self._working():
            if self._file is not None:
                os.fsync(self._file.fileno())
            for directory in (self._path.parent, self._path.parent.parent):
                posixfile.sync_directory(directory)
        self.close()
        return AdapterFile(path=self._key, nbytes=self._nbytes, digest=self._hashed.hexdigest())

    def close(self) -> None:
        """It is whole, or nobody wants it. From any thread; one that is in a call closes it instead, when that ends."""
        with self._lock:
            self._unwanted = True
            busy = self._busy
        if self._file is not None and not busy:
            self._file.close()

    @contextlib.contextmanager
    def _working(self) -> Generator[None]:
        with self._lock:
            if self._unwanted:
                raise StoreError("write", str(self._path), "the file is closed already")
            self._busy = True
        try:
            yield
        except OSError as err:
            raise from_os_error("write", str(self._path), err) from err
        finally:
            with self._lock:
                self._busy = False
                unwanted = self._unwanted
            if unwanted:
                self.close()


def prove(store: ReadableStore, file: AdapterFile) -> None:
    """Read it once and compare.

    Raises:
        CorruptShardError: It is missing, or not what was written.
        StoreError: The store did not answer.
    """
    _look(store, file)


def put(store: Store, file: AdapterFile, path: Path) -> None:
    """Carry a file of this disk there; durable and proven when this returns.

    Raises:
        CorruptShardError: The file, or what the store gives back, is not what was written.
        StoreError: The store does not take it, or there is no file.
    """
    store.put_file(file.path, path)
    prove(store, file)


def ensure(store: Store, file: AdapterFile, path: Path) -> None:
    """As :func:`put`, unless it is there."""
    try:
        prove(store, file)
    except CorruptShardError:  # not there, or not whole
        put(store, file, path)


def bring(store: ReadableStore, file: AdapterFile, path: Path) -> None:
    """A copy on this disk, proven.

    Raises:
        CorruptShardError: It is missing, or not what was written.
        StoreError: The store did not answer, or the disk does not take it.
    """
    try:
        posixfile.make_directory(path.parent)
        with path.open("wb") as out:
            _look(store, file, out)
    except OSError as err:
        raise from_os_error("fetch", str(path), err) from err


def _look(store: ReadableStore, file: AdapterFile, out: BinaryIO | None = None) -> None:
    def hashed(views: Iterator[memoryview]) -> str:
        running = xxhash.xxh3_128()
        if out is not None:
            os.lseek(out.fileno(), 0, os.SEEK_SET)  # after a failure all of it comes anew
        for view in views:
            running.update(view)
            if out is not None:
                posixfile.write_all(out.fileno(), view)
        return running.hexdigest()

    try:
        if (size := store.size(file.path)) != file.nbytes:
            raise CorruptShardError(file.path, f"has {size} bytes, the manifest says {file.nbytes} ({store.url})")
        found = stream(store, file.path, 0, file.nbytes, hashed)
    except StoreNotFoundError as err:
        raise CorruptShardError(file.path, f"the file is missing ({store.url})") from err
    if found != file.digest:
        raise CorruptShardError(file.path, f"its bytes do not match the manifest ({store.url})")
