"""Upload: carry this rank's finished shard to the run root, and prove that it arrived."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dcpsvc.errors import CorruptShardError, StoreNotFoundError
from dcpsvc.format.digest import digest
from dcpsvc.format.manifest import LayoutRef
from dcpsvc.storage.base import carry, copies
from dcpsvc.storage.cargo import Cargo
from dcpsvc.storage.conflict import holds
from dcpsvc.storage.shards import LocalCheck, VerifiedShard
from dcpsvc.storage.unchanged import unchanged

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.storage.base import Store
    from dcpsvc.storage.cargo import Carried, Earlier


class Known(NamedTuple):
    """A committed shard that may have much in common with the next one.

    Attributes:
        record: What its manifest says about it.
        nearer: Where its block table may be read before the run root is asked.
    """

    record: ShardRecord
    nearer: Sequence[Store]


def upload_shard(
    store: Store, record: ShardRecord, path: Path, known: Known | None = None, image: memoryview | None = None
) -> Carried:
    """Put the file under its key. Durable and proven when this returns.

    Every block is compared with the record before it is sent, and every part by the server when it arrives; what no
    server has compared is read back once. What is unchanged since ``known`` the server may copy, with the same proof:
    the new shard stands by itself. What ``image``, the file's beginning in memory, still holds is not read from disk.

    Raises:
        StoreError: The store does not take it.
        CorruptShardError: The file, or what the store gives back, is not what was written.
    """
    check = LocalCheck(record, path)
    return _carry(
        store, record, Cargo(path=path, check=check, image=image, earlier=_earlier(store, record, check, known))
    )


def ensure_shard(store: Store, record: ShardRecord, path: Path, known: Known | None = None) -> None:
    """Like :func:`upload_shard`, but sends nothing if the whole shard is there already, and no part that is there.

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
    check = LocalCheck(record, path)
    earlier = _earlier(store, record, check, known)
    _carry(store, record, Cargo(path=path, check=check, earlier=earlier, may_have_begun=True))


def _earlier(store: Store, record: ShardRecord, check: LocalCheck, known: Known | None) -> Earlier | None:
    """What of the file the store may copy."""
    if known is None or not copies(store):
        return None
    return unchanged(record, check.table(), known.record, [*known.nearer, store])


def _carry(store: Store, record: ShardRecord, cargo: Cargo) -> Carried:
    carried = carry(store, record.path, cargo)
    if not carried.proven:
        VerifiedShard([store], record).verify()
    return carried


def put_layout(store: Store, data: bytes) -> LayoutRef:
    """Store a layout under its digest, once for all checkpoints of that structure; one that has rotted is mended.

    Raises:
        CorruptShardError: What the store gives back is not what was sent.
    """
    reference = LayoutRef(digest=digest(data), nbytes=len(data))
    if holds(store, reference.path, data):
        return reference
    store.create(reference.path, data)
    if not holds(store, reference.path, data):
        store.put(reference.path, data)
        if not holds(store, reference.path, data):
            raise CorruptShardError(reference.path, "does not read back as it was written")
    return reference
