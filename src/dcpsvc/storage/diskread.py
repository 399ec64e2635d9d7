"""A range of a large file, a block at a time, so that it is looked at while it is in the processor's cache.

What the page cache has comes from there. What it lacks, and nobody reads again, is read around it (``O_DIRECT``) where
the file system allows that: half the time, a fraction of the processor's work, and nothing is pushed out of memory.
Never by mapping the file: one that becomes shorter, or a disk that fails, would end the process.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from typing import TYPE_CHECKING

from dcpsvc import linux
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.storage import posixfile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_DIRECT: int = getattr(os, "O_DIRECT", 0)
_SCRATCH_NBYTES = 4 << 20
"""What the disk is asked for at once around the page cache; each thread has so much memory for it."""

_REFUSED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
"""What file systems say that cannot read around the page cache."""

_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_own = threading.local()


def passing(fd: int, begin: int, end: int) -> Iterator[memoryview]:
    """The bytes of a range, through memory of this thread: each view is void when the next one is asked for.

    Fewer only where the file ends. The same holds for :func:`filling`.
    """
    scratch = _scratch()
    for at in range(begin, end, BLOCK_NBYTES):
        view = scratch[: min(BLOCK_NBYTES, end - at)]
        yield view[: posixfile.read_into(fd, at, [view])]


def filling(fd: int, begin: int, views: Sequence[memoryview], *, once: bool) -> Iterator[memoryview]:
    """The bytes from ``begin`` on, which also go to ``views``, one after the other.

    Args:
        fd: A file that nobody else uses.
        begin: The first byte.
        views: Where to.
        once: Nobody reads them again soon.
    """
    end = begin + sum(map(len, views))
    if once and _go_around(fd, begin, end):
        yield from _around(fd, begin, end, list(views))
        return
    at = begin
    for block in _blocks(views):
        found = posixfile.read_into(fd, at, block)
        at += found
        for view in block:
            yield view[:found]
            found -= min(found, len(view))


def _around(fd: int, begin: int, end: int, views: list[memoryview]) -> Iterator[memoryview]:
    at = begin
    while at < end:
        found = _read(fd, at, min(_SCRATCH_NBYTES, end - at))
        if not found:
            return
        at += len(found)
        for low in range(0, len(found), BLOCK_NBYTES):
            block = found[low : low + BLOCK_NBYTES]
            _spread(block, views)
            yield block


def _read(fd: int, at: int, nbytes: int) -> memoryview:
    """Into memory of this thread; whole pages, or up to the end of the file."""
    scratch = _scratch()
    whole = scratch[: -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE]
    try:
        found = os.preadv(fd, [whole], at)
    except OSError as err:
        if err.errno not in _REFUSED:
            raise
        found = 0
    if found < nbytes:  # refused after all, or cut short: where it goes on may be no page of the file's
        _set_direct(fd, on=False)
        found += posixfile.read_into(fd, at + found, [scratch[found:nbytes]])
    return scratch[: min(found, nbytes)]


def _spread(block: memoryview, views: list[memoryview]) -> None:
    """Copy to the first of ``views``, and leave there what is still to be filled."""
    while block:
        count = min(len(block), len(views[0]))
        linux.copy(views[0][:count], block[:count])
        block, rest = block[count:], views.pop(0)[count:]
        if rest:
            views.insert(0, rest)


def _blocks(views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The same memory, cut where a block ends."""
    block: list[memoryview] = []
    room = BLOCK_NBYTES
    for view in views:
        at = 0
        while at < len(view):
            block.append(view[at : at + room])
            at, room = at + len(block[-1]), room - len(block[-1])
            if not room:
                yield block
                block, room = [], BLOCK_NBYTES
    if block:
        yield block


def _go_around(fd: int, begin: int, end: int) -> bool:
    """Whether the range is read around the page cache from now on: it is long, and most of it is not there."""
    if not _DIRECT or end - begin < BLOCK_NBYTES:
        return False
    try:
        if 2 * linux.resident_nbytes(fd, begin, end - begin) > end - begin:
            return False
        _set_direct(fd, on=True)
    except OSError:  # the range begins inside a page, or the file system cannot: no more than that the cache is used
        return False
    return True


def _set_direct(fd: int, *, on: bool) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | _DIRECT if on else flags & ~_DIRECT)


def _scratch() -> memoryview:
    """This thread's: page-aligned, and already touched after the first use."""
    found: memoryview | None = getattr(_own, "scratch", None)
    if found is None:
        found = _own.scratch = memoryview(mmap.mmap(-1, _SCRATCH_NBYTES, flags=_PRIVATE))
    return found
