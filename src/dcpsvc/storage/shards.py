"""Reading a shard so that no unproven byte gets out: every range is checked against the block table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcpsvc.errors import CorruptShardError, StoreError, StoreNotFoundError
from dcpsvc.format import digest, shardfile
from dcpsvc.format.digest import BLOCK_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.storage.base import Store

_READ_NBYTES = 32 << 20


class VerifiedShard:
    """One shard, read from the first of several stores that has it intact. Any thread.

    Args:
        stores: Where to look, nearest first: the local tier, then the run root.
        record: What the manifest says about it.
    """

    def __init__(self, stores: Sequence[Store], record: ShardRecord) -> None:
        self.record = record
        self._stores = list(stores)
        self._table: bytes | None = None

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes ``[begin, end)`` of the body.

        Raises:
            CorruptShardError: No store has them as they were written. Names the file and the first bad block.
            StoreError: The last store could not be asked.
        """
        if begin >= end:
            return memoryview(b"")
        while True:
            try:
                return self._read_from(self._stores[0], begin, end)
            except (CorruptShardError, StoreError):
                if len(self._stores) == 1:
                    raise
                del self._stores[0]

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges that cover the body, each a size that is good to read at once."""
        for begin in range(0, self.record.body_nbytes, _READ_NBYTES):
            yield begin, min(begin + _READ_NBYTES, self.record.body_nbytes)

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read everything once; see :meth:`read` for what it raises.

        Args:
            progress: Called with the number of bytes just verified.
        """
        self._check_size(self._stores[0])
        for begin, end in self.pieces():
            self.read(begin, end)
            if progress:
                progress(end - begin)

    def documents(self) -> dict[str, Any]:
        """The JSON documents of this shard."""
        body, path = self.record.body_nbytes, self.record.path
        head = bytes(self.read(0, shardfile.header_nbytes(path, bytes(self.read(0, 8)), body)))
        return shardfile.documents(path, bytes(self.read(*shardfile.objects_range(path, head, body))))

    def _read_from(self, store: Store, begin: int, end: int) -> memoryview:
        first = begin // BLOCK_NBYTES
        low, high = first * BLOCK_NBYTES, min(-(-end // BLOCK_NBYTES) * BLOCK_NBYTES, self.record.body_nbytes)
        try:
            if self._table is None:
                self._table = self._read_table(store)
            data = memoryview(store.read(self.record.path, low, high))
        except StoreNotFoundError as err:
            raise CorruptShardError(self.record.path, "the file is missing") from err
        if bad := digest.mismatches(data, first, self._table):
            at = bad[0] * BLOCK_NBYTES
            reason = f"bytes {at}..{min(at + BLOCK_NBYTES, self.record.body_nbytes)} do not match their checksum"
            raise CorruptShardError(self.record.path, f"{reason} ({store.url})")
        return data[begin - low : end - low]

    def _read_table(self, store: Store) -> bytes:
        self._check_size(store)
        table = store.read(self.record.path, self.record.body_nbytes, self.record.nbytes)
        if digest.digest(table) != self.record.digest:
            raise CorruptShardError(self.record.path, f"its block table does not match the manifest ({store.url})")
        return table

    def _check_size(self, store: Store) -> None:
        try:
            size = store.size(self.record.path)
        except StoreNotFoundError as err:
            raise CorruptShardError(self.record.path, "the file is missing") from err
        if size != self.record.nbytes:
            raise CorruptShardError(self.record.path, f"has {size} bytes, the manifest says {self.record.nbytes}")
