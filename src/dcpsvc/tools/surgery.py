"""A new checkpoint made of another one: with other values, without a component, or in another run. No pickle, no torch.

The bytes go through a small buffer, proven on the way; what is new is a commit like any other, with a note of where
it comes from.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING

from dcpsvc import fence, identity, sidefiles
from dcpsvc.deletions import noticed
from dcpsvc.errors import DestinationError, RunBusyError, StateError, StoreError
from dcpsvc.format import keys, run
from dcpsvc.format.lineage import Lineage
from dcpsvc.format.parse import compact
from dcpsvc.format.shardfile import of_components
from dcpsvc.leases import held
from dcpsvc.stages import discover, upload
from dcpsvc.storage.conflict import holds
from dcpsvc.storage.shards import VerifiedShard
from dcpsvc.storage.threads import at_once, each
from dcpsvc.tools import adapterfolder, changes, owning
from dcpsvc.tools.transplant import without, write_shards

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.layout import Layout
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.storage.base import Store
    from dcpsvc.tools.changes import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What came of it.

    Attributes:
        manifest: The new commit.
        lineage: Where it comes from, and what was changed.
        newer: Steps that are committed beyond it: ``resume()`` takes those.
    """

    manifest: Manifest
    lineage: Lineage
    newer: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What to do to a checkpoint.

    Attributes:
        source: The run root it lies in.
        manifest: Which it is.
        settings: Values to set.
        drop: Components to leave out.
    """

    source: Store
    manifest: Manifest
    settings: tuple[Setting, ...] = ()
    drop: tuple[str, ...] = ()

    def plan(self) -> _Plan:
        """Everything that can be known before a byte is copied.

        Raises:
            StateError: There is no such value or component, or the new value is of another kind.
            FormatError: The checkpoint is damaged.
            StepDeletedError: It was deleted meanwhile.
        """
        shards = [VerifiedShard([self.source], record) for record in self.manifest.shards]
        with noticed(self.source, self.manifest.key):
            layout = discover.read_layout(self.source, self.manifest)
            befores = each(VerifiedShard.documents, shards, at_once(self.source))
        lines: list[str] = []
        documents: list[bytes] = []
        components = {changes.component(name) for name in layout.names()}
        for before in befores:
            components |= {changes.component(name) for name in of_components(before)}
            after, said = changes.changed(before, self.settings, self.drop)
            lines += said
            documents.append(compact(after))
        named = {*self.drop, *(setting.component for setting in self.settings)}
        if unknown := sorted(named - components):
            raise StateError(unknown[0], f"no such component; there are: {', '.join(sorted(components))}")
        if both := {setting.component for setting in self.settings} & {*self.drop}:
            raise StateError(min(both), "is to be changed and to be dropped")
        lines += [f"without {name}" for name in self.drop]
        folder = self._folder()
        if self.manifest.adapter is not None and folder is None:
            lines.append(f"without the adapter folder, which was made of {self.manifest.adapter.component}")
        return _Plan(shards, documents, without(layout, self.drop), tuple(dict.fromkeys(lines)), folder)

    def _folder(self) -> str | None:
        """What a folder of PEFT is made of in the new checkpoint, too; None: there is none."""
        adapter = self.manifest.adapter
        return None if adapter is None or changes.component(adapter.component) in self.drop else adapter.component


@dataclass(frozen=True, slots=True)
class _Plan:
    shards: list[VerifiedShard]
    documents: list[bytes]
    layout: Layout
    lines: tuple[str, ...]
    folder: str | None


def edit(operation: Operation, progress: Callable[[int], None], *, take_over: bool = False) -> Made:
    """Commit a changed copy under the same step, in the same run; of that step, it is the one that counts from now on.

    Claims the run root, as a job does that starts. The copy has the metrics of the other, with those recorded later. A
    pin beside either keeps both: see :func:`dcpsvc.decision.decide`.

    Args:
        operation: What to do.
        progress: Called with the number of bytes just written.
        take_over: Also if the last job ran on another host, where nobody can see from here whether it lives.

    Raises:
        StateError: There is no such value or component.
        RunBusyError: A job of the run lives, or may live.
        CorruptShardError: The checkpoint is damaged.
        StoreError: The run root does not answer, or does not take it.
    """
    plan = operation.plan()
    owning.check_idle(operation.source, operation.manifest.run_id, take_over=take_over)
    return _commit(operation, plan, operation.source, operation.manifest.run_id, progress)


def promote(operation: Operation, target: Store, progress: Callable[[int], None], *, take_over: bool = False) -> Made:
    """Commit a copy as the newest checkpoint of another run, which is made if there is none: training goes on there.

    The copy has the metrics of the other, with those recorded later, and no pins: they say that something stays here.

    Args:
        operation: What to copy, and what to change on the way.
        target: The other run root.
        progress: Called with the number of bytes just written.
        take_over: As for :func:`edit`, of the other run.

    Raises:
        DestinationError: The other run is this one, or has a commit of that step or a later one.
        RunBusyError: See :func:`edit`; as are the others.
    """
    plan = operation.plan()
    run_id = identity_of(target)
    step = operation.manifest.step
    if run_id == operation.manifest.run_id:
        raise DestinationError(target.url, "is the same run; give the root of another one")
    if newer := [attempt.step for attempt in discover.committed(target) if attempt.step >= step]:
        raise DestinationError(target.url, f"has step {newer[-1]} already, step {step} would not be resumed from")
    owning.check_idle(target, run_id, take_over=take_over)
    return _commit(operation, plan, target, run_id, progress)


def identity_of(target: Store) -> str:
    """Of the run at a root; made if there is none."""
    mine = run.Run(run_id=secrets.token_hex(6), created=owning.utc_now())
    if identity.find(target) is None:
        target.create(keys.RUN, mine.dumps())
    return run.loads(target.url, target.get(keys.RUN, max_nbytes=run.MAX_NBYTES)).run_id


def _commit(operation: Operation, plan: _Plan, target: Store, run_id: str, progress: Callable[[int], None]) -> Made:
    source = operation.manifest
    epoch = owning.claim(target)
    attempt = epoch.attempt(source.step, 0)
    try:
        with held(operation.source, source.key):
            records, layout = write_shards(plan.shards, plan.documents, plan.layout, target, attempt, progress=progress)
            folder = adapterfolder.remake(target, attempt, records, layout, plan.folder) if plan.folder else None
            metrics = sidefiles.metrics_of(operation.source, source)
        manifest = replace(
            source,
            run_id=run_id,
            attempt=attempt.attempt,
            created=owning.utc_now(),
            shards=tuple(records),
            layout=upload.put_layout(target, layout.dumps()),
            adapter=folder,
            metrics=metrics,
            versions=source.versions | {"dcpsvc": metadata.version("dcpsvc")},
        )
        lineage = Lineage(
            attempt=attempt, root=operation.source.url, run_id=source.run_id, source=source.key,
            created=manifest.created, changes=plan.lines,
        )  # fmt: skip
        target.put(attempt.lineage, lineage.dumps())
    except BaseException:  # nothing counts yet; what is written is in nobody's way
        discard(target, attempt)
        raise
    publish(target, manifest)
    newer = tuple(sorted({one.step for one in discover.committed(target) if one.step > source.step}))
    return Made(manifest=manifest, lineage=lineage, newer=newer)


def publish(target: Store, manifest: Manifest) -> None:
    """Commit, unless the run root was taken over meanwhile.

    Raises:
        RunBusyError: It was.
        StoreError: It cannot be written, or does not read back as it was written.
    """
    key, data = manifest.key.manifest, manifest.dumps()
    if theirs := fence.successor(target, manifest.key.epoch):
        discard(target, manifest.key)
        raise RunBusyError(target.url, f"{theirs} has taken it over meanwhile; nothing was changed")
    target.create(key, data)
    if not holds(target, key, data):
        raise StoreError("create", key, "does not read back as it was written")
    verdict = fence.verdict(target, manifest.key)
    if not verdict.counts:
        raise RunBusyError(target.url, f"{verdict.theirs} has taken it over meanwhile; see dcpsvc ls {target.url}")


def discard(target: Store, attempt: Attempt) -> None:
    """Remove what was written for an attempt; nothing of it counts."""
    try:
        for entry in target.list(attempt.data):
            target.delete(entry.key)
        target.delete(attempt.lineage)
    except StoreError:  # it is invisible, and goes with a later commit
        return
