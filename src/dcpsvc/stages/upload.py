"""Upload: carry this rank's finished shard to the run root, and prove that it arrived."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpsvc.errors import CorruptShardError, StoreError
from dcpsvc.format.digest import digest
from dcpsvc.format.manifest import LayoutRef
from dcpsvc.storage.shards import VerifiedShard

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.storage.base import Store


def upload_shard(store: Store, record: ShardRecord, path: Path) -> None:
    """Put the file under its key and read it back once. Durable and proven when this returns.

    Raises:
        StoreError: The store does not take it.
        CorruptShardError: What the store gives back is not what was sent.
    """
    store.put_file(record.path, path)
    VerifiedShard([store], record).verify()


def put_layout(store: Store, data: bytes) -> LayoutRef:
    """Store a layout under its digest, once for all checkpoints of that structure.

    Raises:
        CorruptShardError: Other bytes stand under that name.
    """
    reference = LayoutRef(digest=digest(data), nbytes=len(data))
    if not store.create(reference.path, data) and store.size(reference.path) != len(data):
        raise CorruptShardError(reference.path, f"has {store.size(reference.path)} bytes, not {len(data)}")
    return reference


def discard(stores: Sequence[Store], key: str) -> None:
    """Remove a shard of an attempt that failed; what cannot be removed is debris, never a checkpoint."""
    for store in stores:
        try:
            store.delete(key)
        except StoreError:  # the attempt is invisible without it, and its failure is reported already
            continue
