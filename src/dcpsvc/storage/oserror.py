"""What the operating system's errors mean to somebody who saves a checkpoint."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from dcpsvc.errors import (
    StoreAccessError,
    StoreError,
    StoreFullError,
    StoreNotFoundError,
    StoreObjectError,
    StoreUnavailableError,
)

if TYPE_CHECKING:
    from pathlib import Path

_TRANSIENT = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,
        errno.EMFILE,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENFILE,
        errno.ENOLCK,
        errno.ENOTCONN,
        errno.EPIPE,
        errno.ESHUTDOWN,
        errno.ESTALE,
        errno.ETIMEDOUT,
        # Linux only: s3fs says it for "500 InternalError".
        getattr(errno, "EREMOTEIO", errno.EIO),
    }
)

_SENTENCES: dict[int, tuple[type[StoreError], str]] = {
    errno.ENOENT: (StoreNotFoundError, "there is no such object"),
    errno.EACCES: (StoreAccessError, "permission denied; this user may not do that here"),
    errno.EPERM: (StoreAccessError, "the operation is not permitted here"),
    errno.EROFS: (StoreAccessError, "the file system is mounted read-only"),
    errno.ENOSPC: (StoreFullError, "no space left"),
    errno.EDQUOT: (StoreFullError, "the disk quota is used up"),
    errno.EFBIG: (StoreError, "the file would be larger than the file system or the process limit allows"),
    errno.ENOTDIR: (StoreObjectError, "a part of the path is a file where a directory is needed"),
    errno.EISDIR: (StoreObjectError, "there is a directory where an object is expected"),
    errno.ELOOP: (StoreObjectError, "there is a symbolic link where an object is expected"),
    errno.ENOSYS: (StoreError, "the file system cannot do what a run root needs, such as hard links"),
    errno.ENOTSUP: (StoreError, "the file system cannot do what a run root needs, such as hard links"),
    errno.ENAMETOOLONG: (StoreError, "the name is too long for this file system"),
}


def from_os_error(operation: str, where: str, err: OSError) -> StoreError:
    """The StoreError that says what ``err`` means; to be raised ``from err``.

    An error number decides where there is one; libraries that raise a bare ``PermissionError("text")`` are
    told apart by type.
    """
    number = err.errno or 0
    if number in _SENTENCES:
        kind, reason = _SENTENCES[number]
        return kind(operation, where, reason)
    if number in _TRANSIENT:
        return StoreUnavailableError(operation, where, f"not available now ({os.strerror(number)})")
    if isinstance(err, FileNotFoundError):
        return StoreNotFoundError(operation, where, "there is no such object")
    if isinstance(err, PermissionError):
        return StoreAccessError(operation, where, "permission denied")
    if isinstance(err, (TimeoutError, ConnectionError)):
        return StoreUnavailableError(operation, where, f"not available now ({type(err).__name__})")
    return StoreError(operation, where, f"the store failed ({_detail(err)})")


def local_file_error(where: str, path: Path, err: OSError) -> StoreError:
    """The StoreError for a local file that could not be read to carry it to ``where``.

    Never a StoreNotFoundError: that one speaks of objects in the store.
    """
    return StoreError("put_file", where, f"the local file {path} cannot be read ({_detail(err)})")


def _detail(err: OSError) -> str:
    return os.strerror(err.errno) if err.errno else type(err).__name__
