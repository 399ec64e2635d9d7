"""Calls that Python's ``os`` and ``mmap`` lack, or make with the GIL held. These let other threads run.

Where the C library lacks one, it fails as the kernel would: ``ENOSYS``.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys

MADV_HUGEPAGE = 14
MADV_WIPEONFORK = 18
MADV_POPULATE_WRITE = 23
_START_WRITING = 2
_NICENESS = 10
_LOWEST_BIT = bytes(number & 1 for number in range(256))

_libc = ctypes.CDLL(None, use_errno=True)


def yield_to_training() -> None:
    """Give this thread a lower priority than others of its process. It never gets the old one back."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.nice(_NICENESS)


def madvise(address: int, nbytes: int, advice: int) -> None:
    """Tell the kernel how this memory is going to be used.

    Raises:
        OSError: ``EINVAL`` where the kernel does not know the advice.
    """
    _call("madvise", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_int(advice))


def fallocate(descriptor: int, nbytes: int) -> None:
    """Give an empty file its size and its room on the disk at once. Unlike the C library's own, never by writing zeros.

    Raises:
        OSError: ``ENOSPC``, before anything is taken; ``EOPNOTSUPP`` where the file system cannot.
    """
    # ext4 takes all there is before it says that it is not enough: for that moment everybody's disk would be full.
    found = os.fstatvfs(descriptor)
    if found.f_blocks and found.f_bavail * found.f_frsize < nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    _call("fallocate", ctypes.c_int(descriptor), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(nbytes))


def file_system(descriptor: int) -> int:
    """The number of the kind of file system that a file is on, as in ``statfs(2)``."""
    found = (ctypes.c_long * 32)()
    _call("fstatfs", ctypes.c_int(descriptor), found)
    return found[0] & 0xFFFFFFFF


def begin_writeback(descriptor: int, begin: int, nbytes: int) -> None:
    """Have the kernel carry what was written to the disk now, and not all of it when somebody syncs."""
    flags = ctypes.c_uint(_START_WRITING)
    _call("sync_file_range", ctypes.c_int(descriptor), ctypes.c_int64(begin), ctypes.c_int64(nbytes), flags)


def resident_nbytes(descriptor: int, begin: int, nbytes: int) -> int:
    """How much of a range of a file is in the page cache; of a file that is not the user's own the kernel says: all.

    Args:
        descriptor: Of the file.
        begin: A multiple of a page.
        nbytes: No more than the file has from there on.

    Raises:
        OSError: The kernel does not say.
    """
    pages = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
    address = _map(descriptor, begin, nbytes)
    try:
        _call("mincore", address, ctypes.c_size_t(nbytes), pages)
    finally:
        _call("munmap", address, ctypes.c_size_t(nbytes))
    return min(bytes(pages).translate(_LOWEST_BIT).count(1) * mmap.PAGESIZE, nbytes)


def copy(target: memoryview, source: memoryview) -> None:
    """What ``target[:] = source`` does; both can be written to."""
    if len(target) != len(source):
        raise ValueError(f"{len(source)} bytes do not fit where {len(target)} go")
    if source:
        ctypes.memmove(_address(target), _address(source), len(source))


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(view))


def _map(descriptor: int, begin: int, nbytes: int) -> ctypes.c_void_p:
    """Nobody touches it, so a file that becomes shorter harms nobody."""
    function = _libc.mmap
    function.restype = ctypes.c_void_p
    found = function(
        None, ctypes.c_size_t(nbytes), ctypes.c_int(mmap.PROT_READ), ctypes.c_int(mmap.MAP_SHARED),
        ctypes.c_int(descriptor), ctypes.c_int64(begin),
    )  # fmt: skip
    if found == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return ctypes.c_void_p(found)


def _call(name: str, *arguments: object) -> None:
    function = getattr(_libc, name, None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while function(*arguments) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
