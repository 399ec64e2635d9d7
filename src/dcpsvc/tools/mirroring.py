"""Copies of checkpoints in another place, under their own names: ``dcpsvc cp`` and ``dcpsvc fetch``.

The copy is the same run: its run root can be moved like that, and training goes on there. Bytes are proven on the way;
what lies beside a checkpoint comes along; the manifest comes last, so half a copy is none. Nothing is ever deleted.
"""

from __future__ import annotations

import contextlib
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc import deletions, fence, identity, sidefiles
from dcpsvc.errors import DestinationError, FormatError, StepDeletedError, StoreNotFoundError
from dcpsvc.format import keys, run
from dcpsvc.format.layout import MAX_NBYTES as MAX_LAYOUT_NBYTES
from dcpsvc.format.lineage import MAX_NBYTES as MAX_LINEAGE_NBYTES
from dcpsvc.format.sidefiles import MAX_NBYTES as MAX_NOTE_NBYTES
from dcpsvc.leases import held
from dcpsvc.stages import discover, upload
from dcpsvc.tools import adapterfolder, fetching, owning
from dcpsvc.tools.verifying import AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.manifest import Manifest, ShardRecord
    from dcpsvc.storage.base import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """One checkpoint.

    Attributes:
        step: Training step.
        attempt: Which try.
        nbytes: Of its files.
        found_nbytes: Of it that lay there already, proven like the rest, or committed there.
        gone: It was deleted at its run root meanwhile: there is no copy.
    """

    step: int
    attempt: str
    nbytes: int
    found_nbytes: int
    gone: bool = False


def copy(
    source: Store,
    manifests: Sequence[Manifest],
    target: Store,
    progress: Callable[[int], None],
    *,
    at_once: int = AT_ONCE,
    take_over: bool = False,
) -> list[Copied]:
    """Make ``target`` a run root that holds these checkpoints, too. What is there whole is left as it is.

    Args:
        source: The run root.
        manifests: Which checkpoints, in the order in which they are copied.
        target: Another one: empty, or of the same run.
        progress: Called with the number of bytes just proven, from any thread.
        at_once: Shards copied side by side.
        take_over: Also to a root in which a job has trained: it is taken over, as by a job that starts.

    Raises:
        DestinationError: ``target`` holds another run, or a job has trained there.
        RunBusyError: A job lives there.
        FormatError: A checkpoint is damaged; what was copied stays for the next call.
        StoreError: A run root does not answer, or does not take it.
    """
    run_id = _take_identity(source, target)
    owned = fence.newest_inheritance(target, target.list(keys.EPOCHS)) is not None
    if owned:
        if not take_over:
            raise DestinationError(target.url, "a job has trained there since; to add to it all the same: --take-over")
        owning.check_idle(target, run_id, take_over=True)
    done: list[Copied] = []
    copies = _Copies(source, target, progress, at_once)
    for manifest in manifests:
        try:
            with held(source, manifest.key):
                done.append(copies.one(manifest))
        except StepDeletedError:
            done.append(Copied(step=manifest.step, attempt=manifest.attempt, nbytes=0, found_nbytes=0, gone=True))
    _count_on(target, [manifest.key for manifest in manifests], owned=owned)
    return done


def _take_identity(source: Store, target: Store) -> str:
    ours = source.get(keys.RUN, max_nbytes=run.MAX_NBYTES)
    wanted = run.loads(source.url, ours).run_id
    found = identity.find(target)
    if found is None:
        target.create(keys.RUN, ours)
    elif found.run_id != wanted:
        raise DestinationError(target.url, f"holds run {found.run_id}, not {wanted}")
    return wanted


def _count_on(target: Store, copied: Sequence[Attempt], *, owned: bool) -> None:
    """Whoever claims the root from now on takes a larger number than the copies have, and inherits them."""
    there = (*discover.committed(target), *copied)
    largest = max((attempt.epoch.number for attempt in there), default=0)
    newest = owning.newest_claim(target)
    if newest is None or newest.number < largest:
        mine = owning.make_claim(secrets.token_hex(4))(largest)
        target.create(mine.epoch.claim, mine.dumps())
    if owned:
        owning.claim(target, [one for one in copied if _is_there(target, one)])


def _is_there(store: Store, attempt: Attempt) -> bool:
    try:
        store.size(attempt.manifest)
    except StoreNotFoundError:
        return False
    return True


class _Copies:
    def __init__(self, source: Store, target: Store, progress: Callable[[int], None], at_once: int) -> None:
        self._source, self._target, self._progress, self._at_once = source, target, progress, at_once
        self._directory = fetching.directory_of(target)

    def one(self, manifest: Manifest) -> Copied:
        found_nbytes = 0
        if self._has(manifest):
            self._beside(manifest.key)
            found_nbytes = manifest.nbytes
            self._progress(sum(record.body_nbytes for record in manifest.shards))
        elif not _is_there(self._source, manifest.key):  # nothing is written of what is gone already
            raise deletions.error(self._source, manifest.key)
        else:
            layout = self._source.get(manifest.layout.path, max_nbytes=MAX_LAYOUT_NBYTES)
            upload.put_layout(self._target, layout)
            found_nbytes = self._shards(manifest.shards)
            for file in manifest.adapter.files if manifest.adapter else ():
                adapterfolder.copy(self._source, file, self._target)
            self._beside(manifest.key)
            self._target.put(manifest.key.manifest, manifest.dumps())
        return Copied(step=manifest.step, attempt=manifest.attempt, nbytes=manifest.nbytes, found_nbytes=found_nbytes)

    def _has(self, manifest: Manifest) -> bool:
        """Whether it is committed there, and its files have their sizes; ``verify`` proves their bytes."""
        try:
            return discover.valid(self._target, manifest.key).dumps() == manifest.dumps()
        except FormatError:
            return False

    def _shards(self, records: Sequence[ShardRecord]) -> int:
        with ThreadPoolExecutor(self._at_once) as threads:
            copies = [threads.submit(self._shard, record) for record in records]
            try:
                return sum(copy.result() for copy in copies)
            except BaseException:  # a full disk, or Ctrl-C: nothing more is begun
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _shard(self, record: ShardRecord) -> int:
        if self._directory is not None:
            return fetching.to_directory(self._source, record, self._directory, self._progress)
        return fetching.to_store(self._source, record, self._target, self._progress)

    def _beside(self, attempt: Attempt) -> None:
        """Metrics and pins, but for leases, and where it comes from."""
        there = {entry.key for prefix in (attempt.metrics, attempt.pins) for entry in self._target.list(prefix)}
        for key in (*_notes(self._source, attempt), attempt.lineage):
            if key not in there:
                with contextlib.suppress(StoreNotFoundError):  # most checkpoints were written by training
                    limit = MAX_LINEAGE_NBYTES if key == attempt.lineage else MAX_NOTE_NBYTES
                    self._target.put(key, self._source.get(key, max_nbytes=limit))


def _notes(store: Store, attempt: Attempt) -> list[str]:
    return [entry.key for entry in store.list(attempt.metrics) if keys.record_of(entry.key)] + sidefiles.pins_of(
        store, attempt
    )
