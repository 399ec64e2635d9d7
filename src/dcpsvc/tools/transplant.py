"""Writing a checkpoint's shards anew: other documents, fewer tensors, the same bytes, proven on the way."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dcpsvc.errors import StateError
from dcpsvc.format import digest, shardfile
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.format.layout import ITEM_NBYTES, Chunk, Layout, Tensor
from dcpsvc.format.manifest import ShardRecord
from dcpsvc.format.shardfile import Piece
from dcpsvc.stages import upload
from dcpsvc.storage.posixfile import write_all
from dcpsvc.tools import changes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Store
    from dcpsvc.storage.shards import VerifiedShard

_READ_NBYTES = 32 << 20


def without(layout: Layout, drop: Sequence[str]) -> Layout:
    """The layout without some components.

    Raises:
        StateError: A name that stays is stored under one that goes.
    """
    kept = {name: tensor for name, tensor in layout.tensors.items() if changes.component(name) not in drop}
    aliases = {name: of for name, of in layout.aliases.items() if changes.component(name) not in drop}
    for name, of in aliases.items():
        if of not in kept:
            raise StateError(name, f"is stored as {of}, which is to be dropped")
    return Layout(kept, aliases)


def write_shards(
    shards: Sequence[VerifiedShard],
    documents: Sequence[bytes],
    layout: Layout,
    target: Store,
    attempt: Attempt,
    *,
    progress: Callable[[int], None],
) -> tuple[list[ShardRecord], Layout]:
    """Write the tensors of ``layout`` and the documents as shards of ``attempt``, one after the other.

    Each goes through a temporary file of its size, in ``$TMPDIR``.

    Args:
        shards: Where the tensors lie now, by rank.
        documents: What each rank's shard holds beside its tensors, as JSON.
        layout: The tensors, and where they lie now.
        target: The run root to write to.
        attempt: Whose shards they will be.
        progress: Called with the number of bytes just copied.

    Returns:
        The records, and the layout with the places of the new shards.

    Raises:
        CorruptShardError: A shard is damaged.
        StoreError: A run root does not answer, or does not take it.
    """
    records: list[ShardRecord] = []
    begins: dict[tuple[str, int, tuple[int, ...]], int] = {}
    for rank, shard in enumerate(shards):
        chunks = {
            (name, chunk.offsets): (tensor, chunk)
            for name, tensor in layout.tensors.items()
            for chunk in tensor.chunks
            if chunk.rank == rank
        }
        pieces = [
            Piece(name, tensor.dtype, tensor.shape, c.offsets, c.sizes) for (name, _), (tensor, c) in chunks.items()
        ]
        placement = shardfile.place(pieces)
        about = {"step": str(attempt.step), "attempt": attempt.attempt, "rank": str(rank)}
        with tempfile.NamedTemporaryFile(prefix="dcpsvc-") as file:
            out = Body(file)
            out.write(shardfile.header(placement, len(documents[rank]), about))
            for piece, begin in zip(placement.pieces, placement.begins, strict=True):
                begins[piece.key, rank, piece.offsets] = begin
                if out.nbytes < begin:
                    out.write(placement.padding[1])
                _copy(shard, chunks[piece.key, piece.offsets][1].begin, piece.nbytes, out, progress)
            out.write(documents[rank])
            record = out.finish(rank, attempt.shard(rank))
            upload.upload_shard(target, record, Path(file.name))
        records.append(record)
    return records, _moved(layout, begins)


def _copy(shard: VerifiedShard, begin: int, nbytes: int, out: Body, progress: Callable[[int], None]) -> None:
    for at in range(begin, begin + nbytes, _READ_NBYTES):
        data = shard.read(at, min(at + _READ_NBYTES, begin + nbytes))
        out.write(data)
        progress(len(data))


def _moved(layout: Layout, begins: dict[tuple[str, int, tuple[int, ...]], int]) -> Layout:
    return Layout(
        {
            name: Tensor.of(
                tensor.dtype,
                tensor.shape,
                (Chunk(c.rank, c.offsets, c.sizes, begins[name, c.rank, c.offsets]) for c in tensor.chunks),
            )
            for name, tensor in layout.tensors.items()
        },
        layout.aliases,
    )


def copied_nbytes(layout: Layout) -> int:
    """What writing the tensors of a layout will copy."""
    return sum(run.numel * ITEM_NBYTES[tensor.dtype] for tensor in layout.tensors.values() for run in tensor.runs)


class Body:
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
        self._rest += data
        whole = len(self._rest) // BLOCK_NBYTES * BLOCK_NBYTES
        if whole:
            self._table += digest.table(memoryview(bytes(self._rest[:whole])))
            del self._rest[:whole]

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
