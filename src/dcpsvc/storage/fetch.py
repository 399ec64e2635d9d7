"""What is needed of many shards, a few pieces at a time, in the order of the files."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from dcpsvc.progress import unseen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from dcpsvc.progress import Watch
    from dcpsvc.storage.scatter import Needs, Piece
    from dcpsvc.storage.shards import VerifiedShard

AT_ONCE = 8
"""Requests to a store far away."""

FILES_AT_ONCE = min(AT_ONCE, 2 * (os.cpu_count() or 1))
"""Pieces of files: more threads than that only take the processors from each other."""


def fetch(
    shards: Mapping[int, VerifiedShard],
    needs: Mapping[int, Needs],
    *,
    direct: bool = False,
    proving: bool = False,
    once: bool = False,
    within: Mapping[int, Sequence[tuple[int, int]]] | None = None,
    watch: Watch = unseen,
) -> None:
    """Read, prove and deliver.

    Args:
        shards: By the rank that wrote them.
        needs: What of each.
        direct: Nobody looks at where it goes before this returns; see :meth:`Piece.read`.
        proving: Put nothing anywhere; what cannot be read again cheaply is left out.
        once: Nobody on this machine is going to read the same bytes again soon.
        within: Only these ranges of each, of whole blocks.
        watch: How far it is; told from any thread.

    Raises:
        CorruptShardError: A needed block is missing or not what was written; names the file.
        StoreError: A store did not answer.
    """

    def one(shard: VerifiedShard, piece: Piece, done: Callable[[int], None]) -> None:
        if proving:
            shard.prove(piece.begin, piece.end)
        else:
            piece.read(shard, direct=direct, once=once)
        done(piece.end - piece.begin)

    def work(done: Callable[[int], None]) -> Iterator[Callable[[], None]]:
        for rank, needed in sorted(needs.items()):
            for piece in needed.pieces(None if within is None else within.get(rank, ())):
                yield functools.partial(one, shards[rank], piece, done)

    total = sum(needed.nbytes(None if within is None else within.get(rank, ())) for rank, needed in needs.items())
    at_once = FILES_AT_ONCE if all(shards[rank].cached for rank in needs) else AT_ONCE
    with watch(total) as done, ThreadPoolExecutor(at_once, thread_name_prefix="dcpsvc-read") as pool:
        try:
            for _ in pool.map(lambda each: each(), work(done)):
                pass
        except BaseException:  # an interrupt too: what is not begun need not be
            pool.shutdown(cancel_futures=True)
            raise
