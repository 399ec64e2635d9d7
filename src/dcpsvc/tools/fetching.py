"""Bringing one checkpoint from a run root into a directory: every byte proven, begun again where it broke off."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc.errors import CorruptShardError, DestinationError, StoreNotFoundError
from dcpsvc.format import digest, keys, run
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.format.layout import MAX_NBYTES as MAX_LAYOUT_NBYTES
from dcpsvc.format.lineage import MAX_NBYTES as MAX_LINEAGE_NBYTES
from dcpsvc.storage import posixfile
from dcpsvc.storage.oserror import from_os_error
from dcpsvc.storage.posix import PosixStore
from dcpsvc.storage.shards import VerifiedShard
from dcpsvc.tools.verifying import AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dcpsvc.format.manifest import Manifest, ShardRecord
    from dcpsvc.storage.base import Store

_READ_NBYTES = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What came.

    Attributes:
        nbytes: Of the checkpoint.
        found_nbytes: Of it that lay there already, proven like the rest.
    """

    nbytes: int
    found_nbytes: int


def fetch(
    store: Store, manifest: Manifest, directory: Path, progress: Callable[[int], None], *, at_once: int = AT_ONCE
) -> Fetched:
    """Make ``directory`` a run root that holds the checkpoint. The manifest comes last, so half a copy is none.

    Bytes that an earlier call left there are compared with their checksums and kept as far as they are right.

    Args:
        store: The run root.
        manifest: Which checkpoint.
        directory: A new one, or one of the same run.
        progress: Called with the number of bytes just proven, from any thread.
        at_once: Shards read side by side.

    Raises:
        DestinationError: ``directory`` holds another run.
        CorruptShardError: The checkpoint is damaged; what was right stays for the next call.
        StoreError: The run root does not answer, or the directory cannot be written.
    """
    target = PosixStore(directory)
    _take_identity(store, target)
    layout = manifest.layout.path
    target.put(layout, store.get(layout, max_nbytes=MAX_LAYOUT_NBYTES))
    with contextlib.suppress(StoreNotFoundError):  # most checkpoints were written by training
        lineage = manifest.key.lineage
        target.put(lineage, store.get(lineage, max_nbytes=MAX_LINEAGE_NBYTES))
    with ThreadPoolExecutor(at_once) as threads:
        copies = [threads.submit(_fetch_shard, store, record, directory, progress) for record in manifest.shards]
        try:
            found_nbytes = sum(copy.result() for copy in copies)
        except BaseException:  # a full disk, or Ctrl-C: nothing more is begun
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    target.put(manifest.key.manifest, manifest.dumps())
    return Fetched(nbytes=manifest.nbytes, found_nbytes=found_nbytes)


def _take_identity(store: Store, target: PosixStore) -> None:
    ours = store.get(keys.RUN, max_nbytes=run.MAX_NBYTES)
    wanted = run.loads(store.url, ours).run_id
    try:
        found = run.loads(target.url, target.get(keys.RUN, max_nbytes=run.MAX_NBYTES)).run_id
    except StoreNotFoundError:
        target.create(keys.RUN, ours)
        return
    if found != wanted:
        raise DestinationError(target.url, f"holds run {found}, not {wanted}")


def _fetch_shard(store: Store, record: ShardRecord, directory: Path, progress: Callable[[int], None]) -> int:
    """One shard into its place; says how many bytes of it were there."""
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
