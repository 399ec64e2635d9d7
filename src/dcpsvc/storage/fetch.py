"""What is needed of many shards, a few pieces at a time, in the order of the files."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.progress import unseen
from dcpsvc.storage.scatter import PIECE_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from dcpsvc.progress import Watch
    from dcpsvc.storage.scatter import Needs, Piece
    from dcpsvc.storage.shards import VerifiedShard

AT_ONCE = 8
"""Requests to a store far away."""

FILES_AT_ONCE = min(AT_ONCE, 2 * (os.cpu_count() or 1))
"""Pieces of files: more threads than that only take the processors from each other."""

_LARGEST_NBYTES = 4 * PIECE_NBYTES
"""Of a piece of a file that takes no memory: finding and opening the file is a dozen calls, and after each of them a
thread waits for the interpreter."""

_TURNS = 4
"""Pieces of each thread, at the least, so that all end at about the same time."""


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
            largest = large if proving or (direct and needed.in_place) else PIECE_NBYTES
            for piece in needed.pieces(None if within is None else within.get(rank, ()), largest):
                yield functools.partial(one, shards[rank], piece, done)

    total = sum(needed.nbytes(None if within is None else within.get(rank, ())) for rank, needed in needs.items())
    files = all(shards[rank].cached for rank in needs)
    at_once, large = (FILES_AT_ONCE, _large(total)) if files else (AT_ONCE, PIECE_NBYTES)
    with watch(total) as done, ThreadPoolExecutor(at_once, thread_name_prefix="dcpsvc-read") as pool:
        try:
            for _ in pool.map(lambda each: each(), work(done)):
                pass
        except BaseException:  # an interrupt too: what is not begun need not be
            pool.shutdown(cancel_futures=True)
            raise


def _large(total_nbytes: int) -> int:
    """Of a piece of a file that takes no memory."""
    share = total_nbytes // (_TURNS * FILES_AT_ONCE) // BLOCK_NBYTES * BLOCK_NBYTES
    return min(max(share, PIECE_NBYTES), _LARGEST_NBYTES)
