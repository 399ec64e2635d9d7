"""What ``dcpsvc ls`` shows: the checkpoints of a run root, where else they lie, and why they are kept."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcpsvc import deletions, keeping
from dcpsvc.errors import FormatError, StoreError
from dcpsvc.format import keys
from dcpsvc.policies import Everything
from dcpsvc.sidefiles import SideFiles
from dcpsvc.stages import discover
from dcpsvc.stages.discover import Checkpoint
from dcpsvc.storage.posix import PosixStore
from dcpsvc.storage.threads import at_once
from dcpsvc.tools import showing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dcpsvc.format.keys import Attempt
    from dcpsvc.keeping import Plan
    from dcpsvc.policies import Keep
    from dcpsvc.storage.base import Store

REMOTE, LOCAL = "remote", "local"
"""The run root, and this node's disk."""

_WAITING = "committed on this node's disk only; the next start here finishes its upload"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the listing.

    Attributes:
        checkpoint: As the run root has it, or as this node's disk has it.
        tiers: Where its bytes lie, as seen from this host.
        reasons: Why it is kept, or may go; empty where everything is kept anyway.
        rules: Of the policy, those that keep it.
        best: It is among the best by a metric.
        goes: The policy lets it go.
    """

    checkpoint: Checkpoint
    tiers: tuple[str, ...]
    reasons: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    best: bool = False
    goes: bool = False

    def document(self) -> dict[str, Any]:
        """Everything as JSON-like values."""
        about = {"reasons": list(self.reasons), "best": self.best, "goes": self.goes}
        return showing.listed(self.checkpoint) | {"tiers": list(self.tiers)} | about


def rows(store: Store, local_path: Path | None = None, rule: Keep | None = None) -> list[Row]:
    """Every checkpoint and attempt, ascending by step.

    Args:
        store: The run root.
        local_path: This node's tier of that run; None to look at the run root only.
        rule: What is kept; None asks the policy that the run has recorded, and the pins.
    """
    notes = SideFiles(store, readers=at_once(store))
    seen = discover.look(store, notes, at_once=at_once(store))
    plan = keeping.plan(store, seen, notes, rule)
    pins = notes.pins(time.time())
    found = [one.checkpoint for one in seen]
    here = _local_manifests(local_path)
    known = {checkpoint.key for checkpoint in found if checkpoint.state == "committed"}
    newest = max((attempt.step for attempt in known), default=-1)
    listed = [
        _row(one, here, plan, pins) for one in found if one.key in known or one.key not in here or one.step <= newest
    ]
    waiting = [about for attempt, about in here.items() if about is not None and attempt.step > newest]
    listed += [Row(about, (LOCAL,)) for about in waiting]
    return sorted(listed, key=lambda row: row.checkpoint.step)


def row_of(store: Store, key: Attempt, local_path: Path | None = None) -> Row:
    """The line of one checkpoint.

    Raises:
        StepDeletedError: It was deleted meanwhile.
    """
    for row in rows(store, local_path):
        if row.checkpoint.key == key:
            return row
    raise deletions.error(store, key)


def _row(
    checkpoint: Checkpoint, here: Mapping[Attempt, object], plan: Plan, pins: Mapping[Attempt, tuple[str, ...]]
) -> Row:
    key = checkpoint.key
    tiers = (REMOTE, LOCAL) if key in here else (REMOTE,)
    if checkpoint.state != "committed":
        return Row(checkpoint, tiers)
    if plan.policy in {"", str(Everything())}:  # that all are kept is not worth a column
        return Row(checkpoint, tiers, pins.get(key, ()), ("pinned",) if key in pins else ())
    goes = key in plan.remove
    reason = f"may go: {plan.remove[key]}" if goes else plan.keep.get(key, "")
    return Row(checkpoint, tiers, (reason,), plan.rules.get(key, ()), key in plan.best, goes)


def _local_manifests(path: Path | None) -> dict[Attempt, Checkpoint | None]:
    """The journal of this node's disk; one that cannot be read says nothing, and is not what was asked for."""
    if path is None or not path.is_dir():
        return {}
    store, found = PosixStore(path), dict[keys.Attempt, Checkpoint | None]()
    try:
        for entry in store.list(keys.MANIFESTS):
            if (attempt := keys.attempt_of(entry.key)) is not None:
                found[attempt] = _described(store, attempt)
    except StoreError:
        return {}
    return found


def _described(store: Store, attempt: Attempt) -> Checkpoint | None:
    try:
        manifest = discover.read_manifest(store, attempt)
    except (FormatError, StoreError):
        return None
    return Checkpoint(
        step=attempt.step,
        attempt=attempt.attempt,
        created=discover.created(manifest),
        nbytes=manifest.nbytes,
        world_size=manifest.world_size,
        metrics=manifest.metrics,
        state="incomplete",
        reason=_WAITING,
    )
