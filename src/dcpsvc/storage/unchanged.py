"""What of a shard an earlier one at the same run root has already, from their block tables."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dcpsvc.errors import CorruptShardError, StoreError
from dcpsvc.format.digest import BLOCK_NBYTES, DIGEST_NBYTES
from dcpsvc.storage.cargo import Earlier
from dcpsvc.storage.shards import VerifiedShard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.storage.base import Store

_log = logging.getLogger(__name__)


def unchanged(record: ShardRecord, table: bytes, earlier: ShardRecord, stores: Sequence[Store]) -> Earlier | None:
    """The blocks that a committed shard has at the same place; None where there is nothing to gain, or to compare.

    Costs one small read at most, and none where the first store has the earlier shard.

    Args:
        record: Of the new shard.
        table: Its block table, proven.
        earlier: Of the committed one; at the run root under its key.
        stores: Where to read its table, nearest first.
    """
    if earlier.body_nbytes != record.body_nbytes or earlier.path == record.path:
        return None
    try:
        runs = equal_runs(table, VerifiedShard(stores, earlier).table(), record.body_nbytes)
    except (CorruptShardError, StoreError) as err:  # then all of it is sent
        _log.info("event=not_compared key=%s because=%s", record.path, err)
        return None
    return Earlier(earlier.path, runs) if runs else None


def equal_runs(table: bytes, other: bytes, body_nbytes: int) -> tuple[tuple[int, int], ...]:
    """Ranges of whole blocks that are the same in two bodies of one size; ascending, none touching."""
    runs: list[tuple[int, int]] = []
    for block in range(body_nbytes // BLOCK_NBYTES):
        entry = slice(block * DIGEST_NBYTES, (block + 1) * DIGEST_NBYTES)
        if table[entry] != other[entry]:
            continue
        begin = block * BLOCK_NBYTES
        if runs and runs[-1][1] == begin:
            begin = runs.pop()[0]
        runs.append((begin, (block + 1) * BLOCK_NBYTES))
    return tuple(runs)
