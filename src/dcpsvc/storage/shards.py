"""Reading a shard so that no unproven byte gets out: every range is checked against the block table."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import CorruptShardError, StoreError, StoreNotFoundError
from dcpsvc.format import digest, shardfile
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.storage.base import read_into
from dcpsvc.storage.oserror import local_file_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.storage.base import Store

_READ_NBYTES = 32 << 20
_PROVE_NBYTES = 1 << 20
"""Stays in the processor's cache between the copy and the checksum."""


class VerifiedShard:
    """One shard, read from the first of several stores that has it intact. Any thread.

    Args:
        stores: Where to look, nearest first: the local tier, then the run root.
        record: What the manifest says about it.
    """

    def __init__(self, stores: Sequence[Store], record: ShardRecord) -> None:
        self.record = record
        self._sources = [_Source(store, record) for store in stores]
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

    def read_into(self, begin: int, views: Sequence[memoryview]) -> None:
        """Fill ``views``, one after the other, with proven bytes; after an error they hold anything.

        Args:
            begin: Of a block.
            views: Together whole blocks, or the rest of the body.

        Raises:
            CorruptShardError: As in :meth:`read`.
            StoreError: Likewise.
        """
        self._check_range(begin, begin + sum(map(len, views)))
        while True:
            source = self._sources[0]
            try:
                source.read_into(begin, views)
            except (CorruptShardError, StoreError):
                if not self._has_another(source):
                    raise
            else:
                return

    def _check_range(self, begin: int, end: int) -> None:
        if end > self.record.body_nbytes:
            raise CorruptShardError(self.record.path, f"bytes {begin}..{end} are beyond its {self.record.body_nbytes}")

    @property
    def cached(self) -> bool:
        """Reading something again costs no more than a copy, wherever it is read from."""
        return all(getattr(source.store, "cached", False) for source in self._sources)

    def prove(self, begin: int, end: int) -> None:
        """Read whole blocks, and keep nothing; raises as :meth:`read` does."""
        scratch = memoryview(bytearray(min(_PROVE_NBYTES, end - begin)))
        for at in range(begin, end, len(scratch) or 1):
            self.read_into(at, [scratch[: end - at]])

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
            self.read(begin, end)
            if progress:
                progress(end - begin)

    def table(self) -> bytes:
        """The block table, from the first store that has it as the manifest says.

        Raises:
            CorruptShardError: None has.
            StoreError: As in :meth:`read`.
        """
        while True:
            source = self._sources[0]
            try:
                return source.table()
            except (CorruptShardError, StoreError):
                if not self._has_another(source):
                    raise

    def documents(self) -> dict[str, Any]:
        """The JSON documents of this shard."""
        body, path = self.record.body_nbytes, self.record.path
        head = bytes(self.read(0, shardfile.header_nbytes(path, bytes(self.read(0, min(8, body))), body)))
        return shardfile.documents(path, bytes(self.read(*shardfile.objects_range(path, head, body))))

    def _has_another(self, source: _Source) -> bool:
        """Leave a store that failed for the next one, if there is one. Several threads may come here at once."""
        with self._lock:
            if source is self._sources[-1]:
                return False
            if source is self._sources[0]:
                del self._sources[0]
            return True


class _Source:
    """The shard as one store has it."""

    def __init__(self, store: Store, record: ShardRecord) -> None:
        self.store, self._record = store, record
        self._table: bytes | None = None

    def read_into(self, begin: int, views: Sequence[memoryview]) -> None:
        """Proven bytes of the body, whole blocks."""
        path, first = self._record.path, begin // BLOCK_NBYTES
        try:
            table = self.table()
            read_into(self.store, path, begin, views)
        except StoreNotFoundError as err:
            raise CorruptShardError(path, f"the file is missing ({self.store.url})") from err
        if bad := digest.mismatches(views, first, table):
            at = bad[0] * BLOCK_NBYTES
            reason = f"bytes {at}..{min(at + BLOCK_NBYTES, self._record.body_nbytes)} do not match their checksum"
            raise CorruptShardError(path, f"{reason} ({self.store.url})")

    def table(self) -> bytes:
        """The block table, proven by the record."""
        if self._table is None:
            self._table = self._read_table()  # by several threads, perhaps: none waits for another's store
        return self._table

    def _read_table(self) -> bytes:
        path, nbytes = self._record.path, self._record.nbytes
        if (size := self.store.size(path)) != nbytes:
            raise CorruptShardError(path, f"has {size} bytes, the manifest says {nbytes} ({self.store.url})")
        table = self.store.read(path, self._record.body_nbytes, nbytes)
        if digest.digest(table) != self._record.digest:
            raise CorruptShardError(path, f"its block table does not match the manifest ({self.store.url})")
        return table


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
