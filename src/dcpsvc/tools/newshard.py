"""A shard made outside of a job: through a temporary file of its size, in ``$TMPDIR``, with the table of its blocks."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dcpsvc.format import digest, shardfile
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.format.manifest import ShardRecord
from dcpsvc.storage.oserror import from_os_error
from dcpsvc.storage.posixfile import write_all

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.shardfile import Piece, Placement


@contextmanager
def new_shard(
    placement: Placement,
    documents: bytes,
    attempt: Attempt,
    rank: int,
    data: Callable[[Piece], Iterable[bytes | memoryview]],
) -> Generator[tuple[ShardRecord, Path]]:
    """The record of a shard and its file, durable, which is gone afterwards.

    Args:
        placement: Its pieces, and where each begins.
        documents: What it holds beside its tensors, as JSON.
        attempt: Whose shard it is.
        rank: Whose.
        data: Gives the bytes of a piece.

    Raises:
        StoreError: The file cannot be written; names it.
    """
    about = {"step": str(attempt.step), "attempt": attempt.attempt, "rank": str(rank)}
    with tempfile.NamedTemporaryFile(prefix="dcpsvc-") as file:
        body = _Body(file)
        try:
            body.write(shardfile.header(placement, len(documents), about))
            for piece, begin in zip(placement.pieces, placement.begins, strict=True):
                if body.nbytes < begin:
                    body.write(placement.padding[1])
                for each in data(piece):
                    body.write(each)
            body.write(documents)
            record = body.finish(rank, attempt.shard(rank))
        except OSError as err:
            raise from_os_error("write", file.name, err) from err
        yield record, Path(file.name)


class _Body:
    """A shard's body on its way to a file, with the table of its blocks."""

    def __init__(self, file: IO[bytes]) -> None:
        self._fd = file.fileno()
        self._table = bytearray()
        self._rest = bytearray()
        self.nbytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """More of it."""
        write_all(self._fd, data)
        self.nbytes += len(data)
        begun = (BLOCK_NBYTES - len(self._rest)) % BLOCK_NBYTES  # a block is copied only where two writes share it
        view = memoryview(data)
        self._rest += view[:begun]
        if 0 < len(self._rest) < BLOCK_NBYTES:
            return
        self._table += digest.table(memoryview(bytes(self._rest)))
        whole = begun + (len(view) - begun) // BLOCK_NBYTES * BLOCK_NBYTES
        self._table += digest.table(view[begun:whole])
        self._rest = bytearray(view[whole:])

    def finish(self, rank: int, path: str) -> ShardRecord:
        """The table behind it; durable when this returns."""
        self._table += digest.table(memoryview(bytes(self._rest)))
        table = bytes(self._table)
        write_all(self._fd, table)
        os.fsync(self._fd)
        return ShardRecord(
            rank=rank,
            path=path,
            nbytes=self.nbytes + len(table),
            body_nbytes=self.nbytes,
            digest=digest.digest(table),
        )
