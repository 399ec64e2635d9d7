"""A shard as one store has it: its block table, and bytes that match it."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

from dcpsvc.errors import CorruptShardError, StoreError, StoreNotFoundError
from dcpsvc.format import digest
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.storage.base import read_rest, stream, stream_into

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.storage.base import ReadableStore


class Source:
    """A shard as one store has it. Any thread.

    Args:
        store: Which.
        record: What the manifest says about the shard.
        once: Nothing is to be read twice there, whatever it costs here.

    Attributes:
        nbytes_read: So far; what was refused is counted too.
    """

    def __init__(self, store: ReadableStore, record: ShardRecord, *, once: bool = False) -> None:
        self.store, self._record = store, record
        self._once = once
        self._known: bytes | None = None
        self._asked: Future[bytes] | None = None
        self._lock = threading.Lock()
        self.nbytes_read = 0

    @property
    def whole(self) -> bool:
        """It is there and has its size."""
        try:
            return self.store.size(self._record.path) == self._record.nbytes
        except StoreError:
            return False

    @property
    def cheap(self) -> bool:
        """Reading something again costs no more than a copy."""
        return not self._once and bool(getattr(self.store, "cached", False))

    def read_into(self, begin: int, views: Sequence[memoryview], *, once: bool = False) -> None:
        """Proven bytes of the body, whole blocks; ``once``: see :class:`~dcpsvc.storage.base.StreamingStore`."""
        table, first = self.table(), begin // BLOCK_NBYTES
        look = functools.partial(digest.mismatches, first_block=first, digests=table)
        once = once or self._once  # and no reading ahead: others read what comes next
        try:
            bad = stream_into(self.store, self._record.path, begin, views, look, once=once)
        except StoreNotFoundError as err:
            raise self._missing() from err
        self._count(sum(map(len, views)))
        self._refuse(bad)

    def prove(self, begin: int, end: int) -> bool:
        """Whole blocks, without keeping them; False where that is not cheap: then nothing is read."""
        if not self.cheap:
            return False
        table, path = self.table(), self._record.path
        try:
            bad = stream(
                self.store, path, begin, end, lambda views: digest.mismatches(views, begin // BLOCK_NBYTES, table)
            )
        except StoreNotFoundError as err:
            raise self._missing() from err
        self._count(end - begin)
        self._refuse(bad)
        return True

    def read_tail(self, begin: int) -> memoryview:
        """The proven end of the body, from a block's beginning on, in one request together with the block table."""
        body = self._record.body_nbytes
        data = memoryview(self._read_rest(begin))
        table = bytes(data[body - begin :])
        self._check_table(table)
        self._count(len(data))
        self._refuse(digest.mismatches([data[: body - begin]], begin // BLOCK_NBYTES, table))
        self._known = table
        return data[: body - begin]

    def table(self) -> bytes:
        """One request, however many threads begin at once; all of them hear of its failure."""
        with self._lock:
            if self._known is not None:
                return self._known
            asked, mine = self._asked, Future[bytes]()
            self._asked = asked or mine
        return self._ask(mine) if asked is None else asked.result()

    def _ask(self, asked: Future[bytes]) -> bytes:
        try:
            table = self._read_rest(self._record.body_nbytes)
            self._check_table(table)
        except BaseException as err:  # an interrupt too: the others wait for this answer
            self._asked = None  # whoever comes now asks anew
            asked.set_exception(err)
            raise
        self._count(len(table))
        self._known = table
        asked.set_result(table)
        return table

    def adopt(self, table: bytes) -> None:
        """A table from elsewhere."""
        self._check_table(table)
        self._known = table

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes_read += nbytes

    def _read_rest(self, begin: int) -> bytes:
        path, nbytes = self._record.path, self._record.nbytes
        try:
            size, data = read_rest(self.store, path, begin, max_nbytes=nbytes - begin)
        except StoreNotFoundError as err:
            raise self._missing() from err
        if size != nbytes:
            raise CorruptShardError(path, f"has {size} bytes, the manifest says {nbytes} ({self.store.url})")
        return data

    def _check_table(self, table: bytes) -> None:
        if digest.digest(table) != self._record.digest:
            path = self._record.path
            raise CorruptShardError(path, f"its block table does not match the manifest ({self.store.url})")

    def _refuse(self, bad: Sequence[int]) -> None:
        if bad:
            at = bad[0] * BLOCK_NBYTES
            reason = f"bytes {at}..{min(at + BLOCK_NBYTES, self._record.body_nbytes)} do not match their checksum"
            raise CorruptShardError(self._record.path, f"{reason} ({self.store.url})")

    def _missing(self) -> CorruptShardError:
        return CorruptShardError(self._record.path, f"the file is missing ({self.store.url})")
