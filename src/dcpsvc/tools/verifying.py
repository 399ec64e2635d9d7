"""Proving checkpoints: every byte of every shard, and of the folder of PEFT, against the manifest."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc import deletions
from dcpsvc.errors import FormatError, NoSuchStepError
from dcpsvc.leases import held
from dcpsvc.stages import discover
from dcpsvc.storage import wholefile
from dcpsvc.storage.base import is_there
from dcpsvc.storage.shards import VerifiedShard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dcpsvc.format.adapter import AdapterFile
    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.storage.base import Store
    from dcpsvc.tools.verifyjournal import Journal


AT_ONCE = 4
"""Shards that are read side by side: enough to keep a network busy, few enough to leave memory alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found about one commit.

    Attributes:
        step: Training step.
        attempt: Which try.
        nbytes: Bytes that were read; none if it cannot even be told what belongs to it.
        problems: What is wrong, a sentence each, naming the file; empty if nothing is.
        gone: It was deleted meanwhile, as a live job does: nothing is wrong, and nothing is there.
    """

    step: int
    attempt: str
    nbytes: int
    problems: tuple[str, ...]
    gone: bool = False

    @property
    def intact(self) -> bool:
        """Whether every byte is what was written."""
        return not self.problems and not self.gone


def commits(store: Store, step: int | None) -> list[Attempt]:
    """The commits to verify: all, or those of one step.

    Raises:
        NoSuchStepError: Nothing of that step was ever committed.
        StepDeletedError: It is being deleted, or, as that says, never was committed.
    """
    everything = discover.committed(store)
    found = [attempt for attempt in everything if step in {None, attempt.step}]
    if step is not None and not found:
        deletions.check_step(store, step)
        raise NoSuchStepError(store.url, step, tuple(sorted({attempt.step for attempt in everything})))
    return found


def planned_nbytes(store: Store, attempts: list[Attempt]) -> int:
    """Bytes that verifying them will read; damaged manifests count nothing."""
    total = 0
    for attempt in attempts:
        try:
            total += sum(record.body_nbytes for record in discover.read_manifest(store, attempt).shards)
        except FormatError:  # verify() reports it
            continue
    return total


def verify(
    store: Store,
    attempts: Sequence[Attempt],
    progress: Callable[[int], None] | None = None,
    *,
    at_once: int = AT_ONCE,
    journal: Journal | None = None,
) -> list[Finding]:
    """Read whole checkpoints once and compare every block. Goes on after damage, to name all of it.

    Args:
        store: The run root.
        attempts: Which commits.
        progress: Called with the number of bytes just proven, from any thread.
        at_once: Shards read side by side.
        journal: What an earlier call has proven is not read again; what this one proves is noted.

    Raises:
        StoreError: The store did not answer; that says nothing about the checkpoint.
    """
    with held(store, *attempts), ThreadPoolExecutor(at_once) as threads:
        try:
            begun = [_begin(store, attempt, threads, progress, journal) for attempt in attempts]
            return [_end(store, *each) for each in begun]
        except BaseException:  # a store that is gone, or Ctrl-C: nothing more is begun
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(
    store: Store,
    attempt: Attempt,
    threads: ThreadPoolExecutor,
    progress: Callable[[int], None] | None,
    journal: Journal | None,
) -> tuple[Attempt, list[Future[str]], int, str]:
    try:
        manifest = discover.read_manifest(store, attempt)
        discover.read_layout(store, manifest)
    except FormatError as err:
        return attempt, [], 0, str(err)
    shards = [VerifiedShard([store], record) for record in manifest.shards]
    begun = [threads.submit(_prove, manifest, shard, progress, journal) for shard in shards]
    if manifest.adapter is not None:
        begun += [threads.submit(_prove_file, store, file) for file in manifest.adapter.files]
    return attempt, begun, manifest.nbytes, ""


def _prove(
    manifest: Manifest, shard: VerifiedShard, progress: Callable[[int], None] | None, journal: Journal | None
) -> str:
    """What is wrong with one shard; empty if nothing is."""
    try:
        if journal is None:
            shard.verify(progress)
        else:
            _go_on(manifest, shard, progress, journal)
    except FormatError as err:
        return str(err)
    return ""


def _prove_file(store: Store, file: AdapterFile) -> str:
    """Likewise of a file of its folder of PEFT."""
    try:
        wholefile.prove(store, file)
    except FormatError as err:
        return str(err)
    return ""


def _go_on(manifest: Manifest, shard: VerifiedShard, progress: Callable[[int], None] | None, journal: Journal) -> None:
    proven = journal.proven(manifest, shard.record)
    for begin, end in shard.pieces():
        if end > proven:
            shard.examine(begin, end)
            journal.note(manifest, shard.record, end)
        if progress:
            progress(end - begin)


def _end(store: Store, attempt: Attempt, parts: list[Future[str]], nbytes: int, problem: str) -> Finding:
    problems = tuple(found for found in (problem, *(part.result() for part in parts)) if found)
    if problems and not is_there(store, attempt.manifest):  # who deletes begins with it
        return Finding(step=attempt.step, attempt=attempt.attempt, nbytes=0, problems=(), gone=True)
    return Finding(step=attempt.step, attempt=attempt.attempt, nbytes=0 if problem else nbytes, problems=problems)
