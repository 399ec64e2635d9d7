"""Discover: what a run root holds. Needs a store and nothing else: no ranks, no torch, no training code."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from dcpsvc import deletions
from dcpsvc.commits import is_diverged, listed_metrics
from dcpsvc.errors import (
    CorruptShardError,
    FormatError,
    LayoutError,
    ManifestError,
    StoreNotFoundError,
    StoreObjectError,
)
from dcpsvc.format import keys, layout, manifest
from dcpsvc.format.keys import Attempt
from dcpsvc.listed import Listed
from dcpsvc.sidefiles import SideFiles
from dcpsvc.storage.base import is_there
from dcpsvc.storage.threads import each

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dcpsvc.format.layout import Layout
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.storage.base import Store


READERS = 16
"""Small files that a listing reads at once."""

_NEVER = "no manifest: it was never committed"
_CONDEMNED = "never committed, or being deleted: the rest goes with the next commit, or with dcpsvc gc"
_LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One checkpoint, or an attempt at one, as a listing shows it.

    Attributes:
        step: Training step.
        attempt: Which try.
        created: When the ranks agreed to save it, UTC; None where nothing tells.
        nbytes: Bytes of its files.
        world_size: Ranks that wrote it; None where nothing tells.
        metrics: Numbers given with the save, and those recorded later, which count where both name one.
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

    @property
    def diverged(self) -> bool:
        """Whether it was tagged so: resume takes it only if asked to."""
        return is_diverged(self.metrics)


def committed(store: Store) -> list[Attempt]:
    """Every attempt whose manifest counts, ascending by step, those of one step by epoch.

    One LIST and no manifest is read; the newest inheritance is, if there are commits from before it.

    Raises:
        StoreError: The listing failed. That is never "no checkpoints".
    """
    return Listed(store).counting()


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
    """By step, largest first; of one step by epoch, and of one epoch by when they were made, which is read."""
    alike: dict[tuple[int, int], list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        alike[attempt.step, attempt.epoch.number].append(attempt)
    ordered: list[Attempt] = []
    for _, same in sorted(alike.items(), reverse=True):
        ordered += same if len(same) == 1 else sorted(same, key=lambda one: _created(store, one), reverse=True)
    return ordered


def _created(store: Store, attempt: Attempt) -> str:
    try:
        return read_manifest(store, attempt).created
    except FormatError:
        return ""


def created(found: Manifest) -> datetime:
    """When the ranks agreed to save it, UTC."""
    return datetime.fromisoformat(found.created).astimezone(UTC)


def check_files(store: Store, found: Manifest) -> None:
    """Every file a manifest names is there and has its size. Content is proven on reading.

    Raises:
        CorruptShardError: A file is missing or has another size.
    """
    check_shards(store, found)
    check_layout(store, found)


def check_shards(store: Store, found: Manifest) -> None:
    """As :func:`check_files`, of all but the layout: one LIST of the attempt."""
    _check_sizes(found, {entry.key: entry.nbytes for entry in store.list(found.key.data)})


def check_layout(store: Store, found: Manifest) -> None:
    """As :func:`check_files`, of the layout."""
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


@dataclass(frozen=True, slots=True)
class Seen:
    """A checkpoint, or an attempt at one, with the manifest that was read for it.

    Attributes:
        checkpoint: As listings show it.
        manifest: None where there is none, where it does not count, or where it does not validate.
    """

    checkpoint: Checkpoint
    manifest: Manifest | None = None

    @property
    def counts(self) -> bool:
        """Whether it is a checkpoint."""
        return self.checkpoint.state == "committed"


def listing(store: Store, notes: SideFiles | None = None, *, at_once: int = READERS) -> list[Checkpoint]:
    """Everything of ours below a run root, ascending by step; files with other names are ignored.

    Args:
        store: The run root.
        notes: Metrics that came late; looked at anew. None: for this call only.
        at_once: Manifests read side by side, on threads; 1 reads on the caller's.
    """
    return [one.checkpoint for one in look(store, notes, at_once=at_once)]


def look(store: Store, notes: SideFiles | None = None, *, at_once: int = READERS) -> list[Seen]:
    """As :func:`listing`, with the manifests."""
    notes = notes or SideFiles(store, readers=at_once)
    notes.look()
    sizes, layouts = _sizes(store)
    listed = Listed(store)
    manifests = listed.counting()
    fenced = {*listed.attempts} - {*manifests}
    describe = functools.partial(_describe, store, sizes=sizes, layouts=layouts)
    found = _settled(store, each(describe, manifests, at_once))
    metrics = notes.metrics({one.checkpoint.key: one.checkpoint.metrics for one in found})
    found = [_with(one, listed_metrics(metrics[one.checkpoint.key])) for one in found]
    found += [Seen(_incomplete(attempt, "a newer job had taken the run root over", sizes)) for attempt in fenced]
    found += [Seen(one) for one in _without_manifest(store, sizes, {*listed.attempts}, at_once)]
    return sorted(found, key=lambda one: _age(one.checkpoint))


def _sizes(store: Store) -> tuple[dict[str, int], dict[str, int]]:
    """What is stored of shards and what lies beside them, and of layouts."""
    data, layouts = (store.list(prefix) for prefix in (keys.DATA, keys.LAYOUTS))
    return {entry.key: entry.nbytes for entry in data}, {entry.key: entry.nbytes for entry in layouts}


def _settled(store: Store, found: list[Seen]) -> list[Seen]:
    """With a second look at what seems damaged: a live job may have committed it, or deleted it, since the first."""
    if not any(one.checkpoint.reason for one in found):
        return found
    sizes, layouts = _sizes(store)
    again = [_describe(store, one.checkpoint.key, sizes, layouts) if one.checkpoint.reason else one for one in found]
    # Who deletes begins with the manifest.
    return [one for one in again if not one.checkpoint.reason or is_there(store, one.checkpoint.key.manifest)]


def _with(one: Seen, metrics: dict[str, float]) -> Seen:
    return replace(one, checkpoint=replace(one.checkpoint, metrics=metrics))


def checkpoint_of(found: Manifest, metrics: Mapping[str, float]) -> Checkpoint:
    """A commit as a listing shows it."""
    return Checkpoint(
        step=found.step,
        attempt=found.attempt,
        created=created(found),
        nbytes=found.nbytes,
        world_size=found.world_size,
        metrics=listed_metrics(metrics),
    )


def _age(checkpoint: Checkpoint) -> tuple[int, int, datetime, str]:
    return checkpoint.step, checkpoint.key.epoch.number, checkpoint.created or _LONG_AGO, checkpoint.attempt


def _get(store: Store, key: str, max_nbytes: int, error: type[FormatError]) -> bytes:
    """A file that is missing or cannot be one of ours is damage; a store that says no for other reasons is not."""
    try:
        return store.get(key, max_nbytes=max_nbytes)
    except (StoreNotFoundError, StoreObjectError) as err:
        raise error(key, err.reason) from err


def _describe(store: Store, attempt: Attempt, sizes: dict[str, int], layouts: dict[str, int]) -> Seen:
    try:
        found = read_manifest(store, attempt)
    except FormatError as err:
        return Seen(_incomplete(attempt, f"its manifest does not validate: {err.reason}", sizes))
    reason = ""
    try:
        _check_sizes(found, sizes)
        if layouts.get(found.layout.path) != found.layout.nbytes:
            reason = f"{found.layout.path}: missing or of another size"
    except CorruptShardError as err:
        reason = str(err)
    state = "incomplete" if reason else "committed"
    return Seen(replace(checkpoint_of(found, found.metrics), state=state, reason=reason), found)


def _check_sizes(found: Manifest, sizes: dict[str, int]) -> None:
    for path, nbytes in found.sizes.items():
        if path not in sizes:
            raise CorruptShardError(path, "the file is missing")
        if sizes[path] != nbytes:
            raise CorruptShardError(path, f"has {sizes[path]} bytes, the manifest says {nbytes}")


def _without_manifest(store: Store, sizes: dict[str, int], manifests: set[Attempt], at_once: int) -> list[Checkpoint]:
    """Attempts of which files are left. What was deleted since ``sizes`` were looked at was a checkpoint, perhaps."""
    folders = {key[: key.rfind("/") + 1] for key in sizes}
    attempts = list({one for folder in folders if (one := keys.attempt_below(folder)) is not None} - manifests)
    condemned = deletions.condemned(store) if attempts else ()
    # After the marks: who deletes takes the mark away when no file is left.
    left = zip(attempts, each(lambda one: store.list(one.data), attempts, at_once), strict=True)
    return [
        _incomplete(attempt, _CONDEMNED if attempt in condemned else _NEVER, dict(entries))
        for attempt, entries in left
        if entries
    ]


def _incomplete(attempt: Attempt, reason: str, sizes: dict[str, int]) -> Checkpoint:
    nbytes = sum(size for key, size in sizes.items() if key.startswith(attempt.data))
    return Checkpoint(step=attempt.step, attempt=attempt.attempt, nbytes=nbytes, state="incomplete", reason=reason)
