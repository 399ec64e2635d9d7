"""Reading a shard so that no unproven byte gets out: every range is checked against the block table."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeVar

from dcpsvc.errors import CorruptShardError, StoreError
from dcpsvc.format import digest, shardfile
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.storage.oserror import local_file_error
from dcpsvc.storage.source import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.storage.base import ReadableStore, Store

T = TypeVar("T")

_READ_NBYTES = 32 << 20
_TAIL_NBYTES = 1 << 19
"""Of a body's end, where the JSON documents are."""


class VerifiedShard:
    """One shard, read from the first of several stores that has it intact. Any thread.

    Args:
        stores: Where to look, nearest first: the local tier, then the run root.
        record: What the manifest says about it.
        once: Nothing is to be read twice from the last of them.
    """

    def __init__(self, stores: Sequence[Store], record: ShardRecord, *, once: bool = False) -> None:
        self.record = record
        last = len(stores) - 1
        self._all = tuple(Source(store, record, once=once and at == last) for at, store in enumerate(stores))
        self._sources = list(self._all)
        self._lock = threading.Lock()

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes ``[begin, end)`` of the body.

        Raises:
            CorruptShardError: No store has them as they were written. Names the file and the first bad block.
            StoreError: The last store could not be asked.
        """
        self._check_range(begin, end)
        if begin >= end:
            return memoryview(b"")
        low = begin // BLOCK_NBYTES * BLOCK_NBYTES
        high = min(-(-end // BLOCK_NBYTES) * BLOCK_NBYTES, self.record.body_nbytes)
        data = memoryview(bytearray(high - low))
        self.read_into(low, [data])
        return data[begin - low : end - low]

    def read_into(self, begin: int, views: Sequence[memoryview], *, once: bool = False) -> None:
        """Fill ``views``, one after the other, with proven bytes; after an error they hold anything.

        Args:
            begin: Of a block.
            views: Together whole blocks, or the rest of the body.
            once: Nobody on this machine is going to read them again soon.

        Raises:
            CorruptShardError: As in :meth:`read`.
            StoreError: Likewise.
        """
        self._check_range(begin, begin + sum(map(len, views)))
        self._first(lambda source: source.read_into(begin, views, once=once))

    def _first(self, read: Callable[[Source], T]) -> T:
        """What the nearest store gives that has it intact."""
        while True:
            source = self._sources[0]
            try:
                return read(source)
            except (CorruptShardError, StoreError):
                if not self._has_another(source):
                    raise

    def _check_range(self, begin: int, end: int) -> None:
        if end > self.record.body_nbytes:
            raise CorruptShardError(self.record.path, f"bytes {begin}..{end} are beyond its {self.record.body_nbytes}")

    @property
    def near(self) -> bool:
        """Whether a store before the last has it, and of the right size. Asks no more than that."""
        return any(source.whole for source in self._all[:-1])

    @property
    def nbytes_read(self) -> tuple[int, int]:
        """From the stores before the last, and from the last; what was refused is counted too."""
        return sum(source.nbytes_read for source in self._all[:-1]), self._all[-1].nbytes_read

    def table(self) -> bytes:
        """The block table; raises as :meth:`read` does."""
        return self._first(lambda source: source.table())

    def adopt(self, table: bytes) -> None:
        """Take a table that somebody else has read.

        Raises:
            CorruptShardError: It is not the one that the manifest means.
        """
        for source in self._all:
            source.adopt(table)

    def prefer(self, store: ReadableStore) -> None:
        """Look there first from now on; what it lacks comes from the others. It does not count as one of them."""
        source = Source(store, self.record)
        source.adopt(self.table())
        with self._lock:
            self._sources.insert(0, source)

    def check(self, begin: int, view: memoryview) -> None:
        """Compare whole blocks that somebody else has read with the table.

        Raises:
            CorruptShardError: They are not what was written.
        """
        if bad := digest.mismatches([view], begin // BLOCK_NBYTES, self.table()):
            raise CorruptShardError(
                self.record.path, f"block {bad[0]}, passed on by another rank, is not what was read"
            )

    @property
    def cached(self) -> bool:
        """The nearest store that has it, of the right size, reads something again for no more than a copy."""
        if not any(source.cheap for source in self._sources):
            return False  # nobody need ask
        nearest = next((source for source in self._sources if source.whole), None)
        return nearest is not None and nearest.cheap

    def prove(self, begin: int, end: int) -> bool:
        """Read whole blocks where they can be read again cheaply, and keep nothing; raises as :meth:`read` does.

        Returns:
            False if no such store has the shard intact, but perhaps another one has: then nothing is proven.
        """
        self._check_range(begin, end)
        return self._first(lambda source: source.prove(begin, end))

    def examine(self, begin: int, end: int) -> None:
        """Prove whole blocks, wherever they are; of a file no more is held than the processor's cache takes."""
        if not self.prove(begin, end):
            self.read(begin, end)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges that cover the body, each a size that is good to read at once."""
        for begin in range(0, self.record.body_nbytes, _READ_NBYTES):
            yield begin, min(begin + _READ_NBYTES, self.record.body_nbytes)

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read everything once; see :meth:`read` for what it raises.

        Args:
            progress: Called with the number of bytes just verified.
        """
        for begin, end in self.pieces():
            self.examine(begin, end)
            if progress:
                progress(end - begin)

    def documents(self) -> dict[str, Any]:
        """The JSON documents of this shard: its beginning, and its end with the block table, in one request each."""
        body, path = self.record.body_nbytes, self.record.path
        low = max(0, body - _TAIL_NBYTES) // BLOCK_NBYTES * BLOCK_NBYTES
        tail = self._first(lambda source: source.read_tail(low))
        head = tail if not low else self.read(0, min(BLOCK_NBYTES, body))
        length = shardfile.header_nbytes(path, bytes(head[:8]), body)
        header = bytes(head[:length] if length <= len(head) else self.read(0, length))
        begin, end = shardfile.objects_range(path, header, body)
        return shardfile.documents(path, bytes(tail[begin - low :] if begin >= low else self.read(begin, end)))

    def _has_another(self, source: Source) -> bool:
        """Leave a store that failed for the next one, if there is one. Several threads may come here at once."""
        with self._lock:
            if source is self._sources[-1]:
                return False
            if source is self._sources[0]:
                del self._sources[0]
            return True


class LocalCheck:
    """Compares the bytes of a shard's file with its record, on their way to somewhere else. Any thread."""

    def __init__(self, record: ShardRecord, path: Path) -> None:
        self._record, self._path = record, path
        self._table = b""
        self._lock = threading.Lock()

    def __call__(self, begin: int, view: memoryview) -> None:
        """Bytes of the file from ``begin`` on, which is a multiple of a block.

        Raises:
            CorruptShardError: They are not what was written.
        """
        body, table = view[: max(self._record.body_nbytes - begin, 0)], self.table()
        if bad := digest.mismatches([body], begin // BLOCK_NBYTES, table):
            raise CorruptShardError(self._record.path, f"block {bad[0]} of {self._path} does not match its checksum")
        at = begin + len(body) - self._record.body_nbytes
        if bytes(view[len(body) :]) != table[at : at + len(view) - len(body)]:
            raise CorruptShardError(self._record.path, f"the block table of {self._path} changed while it was read")

    def table(self) -> bytes:
        """The file's block table, proven by the record.

        Raises:
            CorruptShardError: It is not what was written.
            StoreError: The file cannot be read.
        """
        with self._lock:
            if not self._table:
                try:
                    with self._path.open("rb") as file:
                        file.seek(self._record.body_nbytes)
                        self._table = file.read(self._record.nbytes - self._record.body_nbytes + 1)
                except OSError as err:
                    raise local_file_error(self._record.path, self._path, err) from err
                if digest.digest(self._table) != self._record.digest:
                    raise CorruptShardError(self._record.path, f"the block table of {self._path} does not match")
            return self._table
