"""Bringing one shard from a run root to a place: every byte proven, begun again where it broke off."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dcpsvc.errors import CorruptShardError, StoreNotFoundError
from dcpsvc.format import digest
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.stages import upload
from dcpsvc.storage import posixfile
from dcpsvc.storage.oserror import from_os_error
from dcpsvc.storage.shards import VerifiedShard

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.storage.base import Store

_READ_NBYTES = 32 << 20


def to_directory(store: Store, record: ShardRecord, directory: Path, progress: Callable[[int], None]) -> int:
    """One shard into a run root that is a directory; says how many bytes of it were there.

    Bytes that an earlier call left are compared with their checksums and kept as far as they are right.

    Raises:
        CorruptShardError: The shard is damaged; what was right stays for the next call.
        StoreError: The run root does not answer, or the directory cannot be written.
    """
    final = directory / record.path
    part = final.with_name(f".tmp-{final.name}")  # no listing shows it
    try:
        posixfile.make_directory(final.parent)
        if final.exists():  # an earlier call brought it: prove it, and begin anew if it is damaged
            final.rename(part)
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            found = _fill(store, record, fd, progress)
            os.fsync(fd)
        finally:
            os.close(fd)
        part.rename(final)
        posixfile.sync_upwards(final.parent, directory)
    except OSError as err:
        raise from_os_error("fetch", str(final), err) from err
    return found


def to_store(store: Store, record: ShardRecord, target: Store, progress: Callable[[int], None]) -> int:
    """One shard to any run root; says how many bytes of it were there. A whole one is read once and kept.

    From a directory it is sent as it lies there, compared block by block on the way; else it goes through a file of its
    size in ``$TMPDIR``.

    Raises:
        CorruptShardError: The shard is damaged.
        StoreError: A run root does not answer, or does not take it.
    """
    with contextlib.suppress(StoreNotFoundError, CorruptShardError):
        if target.size(record.path) == record.nbytes:
            VerifiedShard([target], record).verify(progress)
            return record.body_nbytes
    if (directory := directory_of(store)) is not None:
        _table(store, record)  # a file that is no shard is not sent at all
        upload.ensure_shard(target, record, directory / record.path)
        progress(record.body_nbytes)
        return 0
    with tempfile.TemporaryDirectory(prefix="dcpsvc-") as aside:
        to_directory(store, record, Path(aside), progress)
        upload.ensure_shard(target, record, Path(aside) / record.path)
    return 0


def directory_of(store: Store) -> Path | None:
    """Where a run root lies on this machine; None if it is elsewhere."""
    return None if "://" in store.url else Path(store.url)


def _fill(store: Store, record: ShardRecord, fd: int, progress: Callable[[int], None]) -> int:
    table = _table(store, record)
    source = VerifiedShard([store], record)
    found = 0
    for begin in range(0, record.body_nbytes, _READ_NBYTES):
        end = min(begin + _READ_NBYTES, record.body_nbytes)
        here = posixfile.read_range(fd, begin, end)
        if len(here) == end - begin and not digest.mismatches([memoryview(here)], begin // BLOCK_NBYTES, table):
            found += len(here)
        else:
            os.lseek(fd, begin, os.SEEK_SET)
            posixfile.write_all(fd, source.read(begin, end))
        progress(end - begin)
    os.lseek(fd, record.body_nbytes, os.SEEK_SET)
    posixfile.write_all(fd, table)
    os.ftruncate(fd, record.nbytes)
    return found


def _table(store: Store, record: ShardRecord) -> bytes:
    """The checksums of a shard's blocks, proven by the manifest."""
    try:
        if (size := store.size(record.path)) != record.nbytes:
            raise CorruptShardError(record.path, f"has {size} bytes, the manifest says {record.nbytes} ({store.url})")
        table = store.read(record.path, record.body_nbytes, record.nbytes)
    except StoreNotFoundError as err:
        raise CorruptShardError(record.path, f"the file is missing ({store.url})") from err
    if digest.digest(table) != record.digest:
        raise CorruptShardError(record.path, f"its block table does not match the manifest ({store.url})")
    return table
