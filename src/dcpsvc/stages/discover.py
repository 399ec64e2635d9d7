"""Discover: what a run root holds. Needs a store and nothing else: no ranks, no torch, no training code."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from dcpsvc.errors import (
    CorruptShardError,
    FormatError,
    LayoutError,
    ManifestError,
    StoreAccessError,
    StoreError,
    StoreNotFoundError,
)
from dcpsvc.format import keys, layout, manifest
from dcpsvc.format.keys import Attempt

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dcpsvc.format.layout import Layout
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.storage.base import Entry, Store


_LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One checkpoint, or an attempt at one, as a listing shows it.

    Attributes:
        step: Training step.
        attempt: Which try.
        created: When the ranks agreed to save it, UTC; None where nothing tells.
        nbytes: Bytes of its shards.
        world_size: Ranks that wrote it; None where nothing tells.
        metrics: Numbers given with the save.
        state: ``committed``, or ``incomplete``: it is no checkpoint and is never resumed from.
        reason: Why it is incomplete.
    """

    step: int
    attempt: str
    created: datetime | None = None
    nbytes: int = 0
    world_size: int | None = None
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    state: str = "committed"
    reason: str = ""

    @property
    def key(self) -> Attempt:
        """Step and attempt."""
        return Attempt(self.step, self.attempt)


def committed(store: Store) -> list[Attempt]:
    """Every attempt that has a manifest, ascending by step: one LIST, and no manifest is read.

    Raises:
        StoreError: The listing failed. That is never "no checkpoints".
    """
    found = [keys.attempt_of(entry.key) for entry in store.list(keys.MANIFESTS)]
    return sorted(attempt for attempt in found if attempt is not None)


def read_manifest(store: Store, attempt: Attempt) -> Manifest:
    """Parse one manifest.

    Raises:
        ManifestError: It does not validate.
    """
    return manifest.loads(attempt.manifest, _get(store, attempt.manifest, manifest.MAX_NBYTES, ManifestError))


def read_layout(store: Store, found: Manifest) -> Layout:
    """Parse the layout of a checkpoint.

    Raises:
        LayoutError: It does not match the manifest or does not validate.
    """
    data = _get(store, found.layout.path, layout.MAX_NBYTES, LayoutError)
    return layout.loads(found.layout.path, data, found.layout.digest)


def newest_first(store: Store, attempts: Iterable[Attempt]) -> list[Attempt]:
    """By step, largest first; several commits of one step by when they were made. Reads only such manifests."""
    by_step: dict[int, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        by_step[attempt.step].append(attempt)
    ordered: list[Attempt] = []
    for step in sorted(by_step, reverse=True):
        same = by_step[step]
        ordered += same if len(same) == 1 else sorted(same, key=lambda one: _created(store, one), reverse=True)
    return ordered


def _created(store: Store, attempt: Attempt) -> str:
    try:
        return read_manifest(store, attempt).created
    except FormatError:
        return ""


def check_files(store: Store, found: Manifest) -> None:
    """Every file a manifest names is there and has its size: one LIST of the attempt. Content is proven on reading.

    Raises:
        CorruptShardError: A file is missing or has another size.
    """
    sizes = {entry.key: entry.nbytes for entry in store.list(found.key.data)}
    _check_sizes(found, sizes)
    try:
        if store.size(found.layout.path) != found.layout.nbytes:
            raise CorruptShardError(found.layout.path, f"has not the {found.layout.nbytes} bytes the manifest says")
    except StoreNotFoundError as err:
        raise CorruptShardError(found.layout.path, "the layout is missing") from err


def valid(store: Store, attempt: Attempt) -> Manifest:
    """A commit whose manifest validates and whose files are all there.

    Raises:
        FormatError: What is wrong.
        StoreError: The store could not be asked.
    """
    found = read_manifest(store, attempt)
    check_files(store, found)
    return found


def listing(store: Store) -> list[Checkpoint]:
    """Everything of ours below a run root, ascending by step; files with other names are ignored."""
    entries = store.list(keys.DATA)
    sizes = {entry.key: entry.nbytes for entry in entries}
    layouts = {entry.key: entry.nbytes for entry in store.list(keys.LAYOUTS)}
    manifests = committed(store)
    found = [_describe(store, attempt, sizes, layouts) for attempt in manifests]
    found += _without_manifest(entries, set(manifests))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.created or _LONG_AGO, checkpoint.attempt))


def _get(store: Store, key: str, max_nbytes: int, error: type[FormatError]) -> bytes:
    """A file that is missing or too large is damage; a store that cannot be asked is not."""
    try:
        return store.get(key, max_nbytes=max_nbytes)
    except StoreError as err:
        if err.transient or isinstance(err, StoreAccessError):
            raise
        raise error(key, err.reason) from err


def _describe(store: Store, attempt: Attempt, sizes: dict[str, int], layouts: dict[str, int]) -> Checkpoint:
    try:
        found = read_manifest(store, attempt)
    except FormatError as err:
        return _incomplete(attempt, f"its manifest does not validate: {err.reason}", sizes)
    reason = ""
    try:
        _check_sizes(found, sizes)
        if layouts.get(found.layout.path) != found.layout.nbytes:
            reason = f"{found.layout.path}: missing or of another size"
    except CorruptShardError as err:
        reason = str(err)
    return Checkpoint(
        step=found.step,
        attempt=found.attempt,
        created=datetime.fromisoformat(found.created).astimezone(UTC),
        nbytes=found.nbytes,
        world_size=found.world_size,
        metrics=found.metrics,
        state="incomplete" if reason else "committed",
        reason=reason,
    )


def _check_sizes(found: Manifest, sizes: dict[str, int]) -> None:
    for shard in found.shards:
        if shard.path not in sizes:
            raise CorruptShardError(shard.path, "the file is missing")
        if sizes[shard.path] != shard.nbytes:
            raise CorruptShardError(shard.path, f"has {sizes[shard.path]} bytes, the manifest says {shard.nbytes}")


def _without_manifest(entries: Iterable[Entry], manifests: set[Attempt]) -> list[Checkpoint]:
    sizes = {entry.key: entry.nbytes for entry in entries}
    attempts = {attempt for key in sizes if (attempt := keys.attempt_below(key)) is not None}
    return [_incomplete(attempt, "no manifest: it was never committed", sizes) for attempt in attempts - manifests]


def _incomplete(attempt: Attempt, reason: str, sizes: dict[str, int]) -> Checkpoint:
    nbytes = sum(size for key, size in sizes.items() if key.startswith(attempt.data))
    return Checkpoint(step=attempt.step, attempt=attempt.attempt, nbytes=nbytes, state="incomplete", reason=reason)
