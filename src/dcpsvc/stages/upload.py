"""Upload: carry this rank's finished shard to the run root, and prove that it arrived."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpsvc.errors import CorruptShardError, StoreError, StoreNotFoundError
from dcpsvc.format.digest import digest
from dcpsvc.format.manifest import LayoutRef
from dcpsvc.storage.base import ProvingStore
from dcpsvc.storage.shards import LocalCheck, VerifiedShard

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.storage.base import Store


def upload_shard(store: Store, record: ShardRecord, path: Path) -> None:
    """Put the file under its key. Durable and proven when this returns.

    Every block is compared with the record before it is sent, and every part by the server when it arrives; what no
    server has compared is read back once.

    Raises:
        StoreError: The store does not take it.
        CorruptShardError: The file, or what the store gives back, is not what was written.
    """
    if isinstance(store, ProvingStore):
        if store.put_proven(record.path, path, check=LocalCheck(record, path)):
            return
    else:
        store.put_file(record.path, path)
    VerifiedShard([store], record).verify()


def ensure_shard(store: Store, record: ShardRecord, path: Path) -> None:
    """Like :func:`upload_shard`, but sends nothing if the whole shard is there already.

    Raises:
        StoreError: The store does not take it, or the file is neither there nor here.
        CorruptShardError: What the store gives back is not what the record says.
    """
    try:
        if store.size(record.path) == record.nbytes:
            VerifiedShard([store], record).verify()
            return
    except (StoreNotFoundError, CorruptShardError):  # not there, or not whole
        pass
    upload_shard(store, record, path)


def put_layout(store: Store, data: bytes) -> LayoutRef:
    """Store a layout under its digest, once for all checkpoints of that structure; one that has rotted is mended.

    Raises:
        CorruptShardError: What the store gives back is not what was sent.
    """
    reference = LayoutRef(digest=digest(data), nbytes=len(data))
    store.create(reference.path, data)
    if not _holds(store, reference, data):
        store.put(reference.path, data)
        if not _holds(store, reference, data):
            raise CorruptShardError(reference.path, "does not read back as it was written")
    return reference


def _holds(store: Store, reference: LayoutRef, data: bytes) -> bool:
    return store.size(reference.path) == len(data) and store.read(reference.path, 0, len(data)) == data


def discard(stores: Sequence[Store], key: str) -> None:
    """Remove a shard of an attempt that failed; what cannot be removed is debris, never a checkpoint."""
    for store in stores:
        try:
            store.delete(key)
        except StoreError:  # the attempt is invisible without it, and its failure is reported already
            continue
