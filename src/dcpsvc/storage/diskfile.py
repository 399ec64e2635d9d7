"""A large file, written once, front to back, at the speed of the disk.

Around the page cache (``O_DIRECT``) where the file system allows it: half the time and a tenth of the processor's work.
Elsewhere (some overlay, NFS and FUSE, older tmpfs) through the page cache, which is made to write along the way. Every
call into the kernel lets other threads run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

from dcpsvc import linux
from dcpsvc.storage import posixfile

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_PAGE_NBYTES = 4096
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_LANES, _PIECE_NBYTES = 3, 32 << 20
"""Calls under way at once, and what each takes: the disk has the next one while this thread waits for a processor."""

_NEW_DIRECTORIES = 3
"""How far up a directory may be new: the attempt's, ``data/``, and the one it is in."""

_REFUSED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
"""What file systems say that cannot do what would only make things faster."""


class DiskFile:
    """A new file. Leaving the context without :meth:`keep` removes it: room on a disk that may be full is given back.

    Args:
        path: Must not exist; its directory must.
        nbytes: How large it will be; the room is taken at once.

    Attributes:
        direct: It is written around the page cache, so far.
        reserved_nbytes: Room on the disk that it has.

    Raises:
        OSError: ``ENOSPC`` before the first byte, where the file system can say so.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._path, self._at, self._kept = path, 0, False
        self._lanes, self._under_way = ThreadPoolExecutor(_LANES, "dcpsvc-write"), deque[Future[None]]()
        self._descriptor, self.direct = _open(path)
        try:
            self.reserved_nbytes = self._reserve(nbytes)
        except BaseException:  # the name is given back, whatever it is
            self._close()
            raise

    def __enter__(self) -> Self:
        """Ready to be written."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close, and remove what is not whole."""
        self._close()

    def write(self, data: memoryview, *, lasting: bool = False) -> None:
        """Append. Fast for whole pages that begin on a page in memory; from the first others on it is buffered.

        Args:
            data: What.
            lasting: It stays as it is until :meth:`sync` returns or the file is closed: then this returns before
                all of it is written.
        """
        whole = len(data) // _PAGE_NBYTES * _PAGE_NBYTES if self.direct else 0
        if lasting:
            self._begin(data[:whole])
        else:
            self._append(data[:whole])
        if whole < len(data):
            self._settle(0)
            self._go_buffered()
            self._append(data[whole:])

    def sync(self) -> None:
        """All that was written is durable when this returns, its name and its directories' included."""
        self._settle(0)
        os.fsync(self._descriptor)
        for directory in self._path.parents[:_NEW_DIRECTORIES]:
            posixfile.sync_directory(directory)

    def keep(self) -> None:
        """The file stays."""
        self._kept = True

    def _begin(self, data: memoryview) -> None:
        for begin in range(0, len(data), _PIECE_NBYTES):
            piece = data[begin : begin + _PIECE_NBYTES]
            self._under_way.append(self._lanes.submit(self._write, piece, self._at))
            self._at += len(piece)
            self._settle(_LANES)

    def _settle(self, at_most: int) -> None:
        while len(self._under_way) > at_most:
            self._under_way.popleft().result()

    def _append(self, data: memoryview) -> None:
        self._write(data, self._at)
        self._at += len(data)

    def _write(self, data: memoryview, at: int) -> None:
        begin = at
        while data:
            try:
                count = self._write_some(data, at)
            except OSError as err:
                # A file system that takes O_DIRECT when opening and not when writing, or wants another alignment.
                if err.errno not in _REFUSED or not self.direct:
                    raise
                self._go_buffered()
                continue
            data, at = data[count:], at + count
        if not self.direct and at > begin:
            with contextlib.suppress(OSError):  # it says no more than that the page cache decides
                linux.begin_writeback(self._descriptor, begin, at - begin)

    def _write_some(self, data: memoryview, at: int) -> int:
        """One call, which may take less."""
        return os.pwrite(self._descriptor, data, at)

    def _reserve(self, nbytes: int) -> int:
        try:
            linux.fallocate(self._descriptor, nbytes)
        except OSError as err:
            if err.errno not in _REFUSED:
                raise
            return 0
        return nbytes

    def _go_buffered(self) -> None:
        if self.direct:
            self.direct = False
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)

    def _close(self) -> None:
        self._lanes.shutdown(cancel_futures=True)  # the number of the descriptor may be another file's soon
        os.close(self._descriptor)
        if not self._kept:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


def _open(path: Path) -> tuple[int, bool]:
    """A new file; says whether it is written around the page cache."""
    if _DIRECT:
        try:
            return os.open(path, _NEW | _DIRECT, 0o644), True
        except OSError as err:
            if err.errno not in _REFUSED:
                raise
            path.unlink(missing_ok=True)  # some file systems have made it all the same
    return os.open(path, _NEW, 0o644), False
