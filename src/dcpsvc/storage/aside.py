"""Proven blocks that wait on this node's disk until all ranks have proven theirs, so that no memory has to hold them.

They lie in a file without a name, which is gone with the process, and with the last who may still read or write it.
"""

from __future__ import annotations

import bisect
import errno
import os
import tempfile
import weakref
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from dcpsvc import linux
from dcpsvc.errors import StoreNotFoundError
from dcpsvc.storage import diskread, posixfile
from dcpsvc.storage.oserror import from_os_error
from dcpsvc.storage.ranges import check_length

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from dcpsvc.storage.scatter import Range

T = TypeVar("T")

_IN_MEMORY = frozenset({0x01021994, 0x858458F6})
"""Kinds of file systems whose files take memory: tmpfs, ramfs."""

_NO_FALLOCATE = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


class Aside:
    """A file for blocks of shards.

    Args:
        folder: On a disk of this node.

    Raises:
        OSError: No file can be made there; ``ENOTBLK``: files there are memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._end = folder, 0
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            if linux.file_system(file.fileno()) in _IN_MEMORY:
                raise OSError(errno.ENOTBLK, f"files at {folder} are memory")
            self.descriptor = os.dup(file.fileno())
        # Never by hand: a thread that is late would write to whatever file has this number next.
        weakref.finalize(self, os.close, self.descriptor)

    def reserve(self, runs: Sequence[Range]) -> Blocks:
        """Room for ranges of a shard, whole blocks, ascending.

        Raises:
            OSError: ``ENOSPC``, before the first byte.
        """
        begins: list[int] = []
        for low, high in runs:
            begins.append(self._end)
            self._end += high - low
        self._take_room()
        return Blocks(self, self._folder, runs, begins)

    def _take_room(self) -> None:
        try:
            linux.fallocate(self.descriptor, max(self._end, 1))
        except OSError as err:
            if err.errno not in _NO_FALLOCATE:
                raise
            os.truncate(self.descriptor, self._end)
            found = os.fstatvfs(self.descriptor)
            if found.f_bavail * found.f_frsize < self._end:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from err


class Blocks:
    """Some blocks of one shard in such a file: a store that has nothing else. Any thread.

    Args:
        aside: The file.
        folder: Where it is.
        runs: Which, ascending.
        begins: Where in the file each run begins.
    """

    cached = True
    """They were written a moment ago."""

    def __init__(self, aside: Aside, folder: Path, runs: Sequence[Range], begins: Sequence[int]) -> None:
        self._aside, self._runs, self._begins = aside, tuple(runs), tuple(begins)
        self._ends = [high for _, high in runs]
        self.url = f"{folder} (set aside)"

    def sinks(self) -> list[Kept]:
        """What brings them here."""
        return [Kept(low, high, self) for low, high in self._runs]

    def write(self, begin: int, proven: memoryview) -> None:
        """Keep a range."""
        at = self._place(begin, begin + len(proven))
        try:
            while proven:
                count = os.pwrite(self._aside.descriptor, proven, at)
                at, proven = at + count, proven[count:]
        except OSError as err:
            raise from_os_error("write", self.url, err) from err

    def read(self, key: str, begin: int, end: int) -> bytes:
        """See :meth:`ReadableStore.read <dcpsvc.storage.base.ReadableStore.read>`; ranges that are not here too."""
        del key
        at = self._place(begin, end)
        data = posixfile.read_range(self._aside.descriptor, at, at + end - begin)
        check_length("read", self.url, len(data), end - begin)
        return data

    def size(self, key: str) -> int:
        """They are some blocks and no object.

        Raises:
            StoreNotFoundError: Always.
        """
        raise StoreNotFoundError("size", f"{self.url}: {key}", "only some blocks of it are here")

    def stream(self, key: str, begin: int, end: int, look: Callable[[Iterator[memoryview]], T]) -> T:
        """See :class:`StreamingStore <dcpsvc.storage.base.StreamingStore>`."""
        del key
        at = self._place(begin, end)
        return look(diskread.passing(self._aside.descriptor, at, at + end - begin))

    def stream_into(
        self,
        key: str,
        begin: int,
        views: Sequence[memoryview],
        look: Callable[[Iterator[memoryview]], T],
        *,
        once: bool = False,
    ) -> T:
        """See :class:`StreamingStore <dcpsvc.storage.base.StreamingStore>`; from the page cache."""
        del key, once  # others read the same file
        at = self._place(begin, begin + sum(map(len, views)))
        return look(diskread.filling(self._aside.descriptor, at, views, once=False))

    def _place(self, begin: int, end: int) -> int:
        """Where in the file a range is."""
        number = bisect.bisect_right(self._ends, begin)
        if number == len(self._runs) or begin < self._runs[number][0] or end > self._runs[number][1]:
            raise StoreNotFoundError("read", self.url, f"bytes {begin}..{end} are not here")
        return self._begins[number] + begin - self._runs[number][0]


class Kept(NamedTuple):
    """A sink: what comes is written aside."""

    begin: int
    end: int
    blocks: Blocks

    @property
    def view(self) -> None:
        """None: it takes proven bytes only."""

    def filled(self, nbytes: int) -> None:
        """Nothing more to do."""

    def put(self, begin: int, proven: memoryview) -> None:
        """To the disk, or on the way there."""
        self.blocks.write(begin, proven)
