"""Writing a checkpoint's shards anew: other documents, fewer tensors, the same bytes, proven on the way."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import TYPE_CHECKING

from dcpsvc.errors import StateError
from dcpsvc.format import shardfile
from dcpsvc.format.layout import ITEM_NBYTES, Chunk, Layout, Tensor
from dcpsvc.format.shardfile import Piece
from dcpsvc.stages import upload
from dcpsvc.tools import changes
from dcpsvc.tools.newshard import new_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.manifest import ShardRecord
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
    by_rank = _chunks(layout)
    for rank, shard in enumerate(shards):
        chunks = by_rank.pop(rank, {})
        placement = shardfile.place(chunks)
        for piece, begin in zip(placement.pieces, placement.begins, strict=True):
            begins[piece.key, rank, piece.offsets] = begin
        data = functools.partial(_read, shard, chunks, progress)
        with new_shard(placement, documents[rank], attempt, rank, data) as (record, path):
            upload.upload_shard(target, record, path)
        records.append(record)
    return records, _moved(layout, begins)


def _chunks(layout: Layout) -> dict[int, dict[Piece, Chunk]]:
    """What lies in the shard of each rank that has any."""
    found: dict[int, dict[Piece, Chunk]] = defaultdict(dict)
    for name, tensor in layout.tensors.items():
        for chunk in tensor.chunks:
            found[chunk.rank][Piece(name, tensor.dtype, tensor.shape, chunk.offsets, chunk.sizes)] = chunk
    return found


def _read(
    shard: VerifiedShard, chunks: dict[Piece, Chunk], progress: Callable[[int], None], piece: Piece
) -> Iterator[bytes | memoryview]:
    begin = chunks[piece].begin
    end = begin + piece.nbytes
    for at in range(begin, end, _READ_NBYTES):
        data = shard.read(at, min(at + _READ_NBYTES, end))
        yield data
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
