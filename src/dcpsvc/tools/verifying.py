"""Proving checkpoints: every byte of every shard against the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc.errors import FormatError, NoSuchStepError
from dcpsvc.stages import discover
from dcpsvc.storage.shards import VerifiedShard

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found about one commit.

    Attributes:
        step: Training step.
        attempt: Which try.
        nbytes: Bytes that were proven.
        problems: What is wrong, a sentence each, naming the file; empty if nothing is.
    """

    step: int
    attempt: str
    nbytes: int
    problems: tuple[str, ...]

    @property
    def intact(self) -> bool:
        """Whether every byte is what was written."""
        return not self.problems


def commits(store: Store, step: int | None) -> list[Attempt]:
    """The commits to verify: all, or those of one step.

    Raises:
        NoSuchStepError: Nothing of that step was ever committed.
    """
    everything = discover.committed(store)
    found = [attempt for attempt in everything if step in {None, attempt.step}]
    if step is not None and not found:
        raise NoSuchStepError(store.url, step, tuple(sorted({attempt.step for attempt in everything})))
    return found


def planned_nbytes(store: Store, attempts: list[Attempt]) -> int:
    """Bytes that verifying them will read; damaged manifests count nothing."""
    total = 0
    for attempt in attempts:
        try:
            total += discover.read_manifest(store, attempt).nbytes
        except FormatError:  # verify() reports it
            continue
    return total


def verify(store: Store, attempt: Attempt, progress: Callable[[int], None] | None = None) -> Finding:
    """Read a whole checkpoint once and compare every block. Goes on after damage, to name all of it.

    Args:
        store: The run root.
        attempt: Which commit.
        progress: Called with the number of bytes just proven.

    Raises:
        StoreError: The store did not answer; that says nothing about the checkpoint.
    """
    problems: list[str] = []
    proven = 0

    def count(nbytes: int) -> None:
        nonlocal proven
        proven += nbytes
        if progress:
            progress(nbytes)

    try:
        manifest = discover.read_manifest(store, attempt)
        discover.read_layout(store, manifest)
    except FormatError as err:
        return Finding(step=attempt.step, attempt=attempt.attempt, nbytes=0, problems=(str(err),))
    for record in manifest.shards:
        try:
            VerifiedShard([store], record).verify(count)
        except FormatError as err:
            problems.append(str(err))
    return Finding(step=attempt.step, attempt=attempt.attempt, nbytes=proven, problems=tuple(problems))
