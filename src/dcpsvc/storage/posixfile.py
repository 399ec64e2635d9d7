"""The few steps of POSIX files that make an object appear whole, once, and for good."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from dcpsvc.storage.names import temp_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from io import FileIO
    from pathlib import Path

COPY_NBYTES = 8 * 2**20
_DIRECTORY_ATTEMPTS = 5
_IOV_MAX = 1024
_UNSYNCABLE = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF})
"""What file systems say that cannot sync a directory (CIFS, some FUSE) and need not."""


def open_temp(directory: Path) -> tuple[int, Path]:
    """A new file under a temporary name in ``directory``, which is made with its parents if need be."""
    temp = directory / temp_name()
    for _ in range(_DIRECTORY_ATTEMPTS):
        try:
            return _open_new(temp), temp
        except FileNotFoundError:
            # Looked for again each time: a delete elsewhere may remove the directory while it is still empty.
            make_directory(directory)
    return _open_new(temp), temp


def make_directory(directory: Path) -> None:
    """Make ``directory`` and its parents, each durable in its own parent. Callers may race."""
    try:
        directory.mkdir()
    except FileExistsError:
        return
    except FileNotFoundError:
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
    sync_directory(directory.parent)


def stranger(directory: Path) -> int | None:
    """Who else made a directory where everybody may make one, such as /tmp; None if it is this user's own."""
    sticky, owner = directory.parent.stat().st_mode & stat.S_ISVTX, directory.stat().st_uid
    return owner if sticky and owner != os.geteuid() else None


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of ``data``; one ``write`` may take less."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def copy(source: FileIO, fd: int, progress: Callable[[int], None] | None) -> int:
    """Copy the rest of ``source`` and say how many bytes that was."""
    buffer = memoryview(bytearray(COPY_NBYTES))
    copied = 0
    while count := source.readinto(buffer):
        write_all(fd, buffer[:count])
        copied += count
        if progress:
            progress(count)
    return copied


def read_range(fd: int, begin: int, end: int) -> bytes:
    """Bytes ``[begin, end)``, fewer only where the file ends."""
    data = os.pread(fd, end - begin, begin)
    if len(data) == end - begin:
        return data
    parts = [data]
    while parts[-1]:
        begin += len(parts[-1])
        parts.append(os.pread(fd, end - begin, begin))
    return b"".join(parts)


def read_into(fd: int, begin: int, views: Sequence[memoryview]) -> int:
    """Fill ``views`` with the bytes from ``begin`` on; fewer than they hold only where the file ends."""
    left, found = [view for view in views if view], 0
    while left:
        count = os.preadv(fd, left[:_IOV_MAX], begin + found)
        if not count:
            break
        found += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]
    return found


def link(temp: Path, target: Path) -> bool:
    """Give a finished file its name unless that is taken; say whether it got it."""
    try:
        os.link(temp, target)
    except FileExistsError:
        # NFS: the answer to a link that did happen gets lost, and the resent one meets our own file.
        return temp.stat().st_nlink > 1
    except OSError as err:
        if err.errno in {errno.EPERM, errno.ENOTSUP, errno.EMLINK}:
            raise OSError(errno.ENOSYS, "this file system has no hard links") from err
        raise
    return True


def rename(temp: Path, target: Path) -> bool:
    """Give a finished file its name, whatever had it before."""
    temp.rename(target)
    return True


def sync_upwards(directory: Path, root: Path) -> None:
    """Make names durable from ``directory`` up to ``root``.

    All of them, since another process may have made a directory on the way a moment ago and not synced it yet.
    """
    sync_directory(directory)
    while directory != root and root in directory.parents:
        directory = directory.parent
        sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as err:
        if err.errno not in _UNSYNCABLE:
            raise
    finally:
        os.close(fd)


def remove_if_empty(directory: Path) -> bool:
    """Remove ``directory`` if nothing is in it; say whether this call did."""
    try:
        directory.rmdir()
    except OSError:
        # In use, gone already, or not ours to remove: an empty directory that stays is no object and harms nobody.
        return False
    return True


def _open_new(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
