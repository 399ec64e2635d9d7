"""What ``dcpsvc ls`` shows: the checkpoints of a run root, where else they lie, and why they are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcpsvc import keeping
from dcpsvc.errors import FormatError, StoreError
from dcpsvc.format import keys
from dcpsvc.policies import Everything
from dcpsvc.reading import at_once
from dcpsvc.sidefiles import SideFiles
from dcpsvc.stages import discover
from dcpsvc.stages.discover import Checkpoint, Seen
from dcpsvc.storage.posix import PosixStore
from dcpsvc.tools import showing

if TYPE_CHECKING:
    from pathlib import Path

    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Store

Why = Callable[[Checkpoint], Sequence[str]]
"""Why a checkpoint is kept, a short text for each reason."""

REMOTE, LOCAL = "remote", "local"
"""The run root, and this node's disk."""

_WAITING = "committed on this node's disk only; the next start here finishes its upload"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the listing.

    Attributes:
        checkpoint: As the run root has it, or as this node's disk has it.
        tiers: Where its bytes lie, as seen from this host.
        reasons: Why it is kept.
    """

    checkpoint: Checkpoint
    tiers: tuple[str, ...]
    reasons: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Everything as JSON-like values."""
        return showing.listed(self.checkpoint) | {"tiers": list(self.tiers), "reasons": list(self.reasons)}


def rows(store: Store, local_path: Path | None = None, why: Why | None = None) -> list[Row]:
    """Every checkpoint and attempt, ascending by step.

    Args:
        store: The run root.
        local_path: This node's tier of that run; None to look at the run root only.
        why: Why a commit is kept; None asks the policy that the run has recorded, and the pins.
    """
    notes = SideFiles(store, readers=at_once(store))
    seen = discover.look(store, notes, at_once=at_once(store))
    why = why or _recorded(store, seen, notes)
    found = [one.checkpoint for one in seen]
    here = _local_manifests(local_path)
    known = {checkpoint.key for checkpoint in found if checkpoint.state == "committed"}
    newest = max((attempt.step for attempt in known), default=-1)
    listed = [_row(one, here, why) for one in found if one.key in known or one.key not in here or one.step <= newest]
    waiting = [about for attempt, about in here.items() if about is not None and attempt.step > newest]
    listed += [Row(about, (LOCAL,)) for about in waiting]
    return sorted(listed, key=lambda row: row.checkpoint.step)


def _recorded(store: Store, found: Sequence[Seen], notes: SideFiles) -> Why:
    plan = keeping.plan(store, found, notes)
    if plan.policy in {"", str(Everything())}:  # that all are kept is not worth a column
        pins = notes.pins(time.time())
        return lambda checkpoint: list(pins.get(checkpoint.key, ()))
    return lambda checkpoint: [plan.keep.get(checkpoint.key) or f"may go: {plan.remove.get(checkpoint.key, '')}"]


def _row(checkpoint: Checkpoint, here: Mapping[Attempt, object], why: Why) -> Row:
    tiers = (REMOTE, LOCAL) if checkpoint.key in here else (REMOTE,)
    return Row(checkpoint, tiers, tuple(why(checkpoint)) if checkpoint.state == "committed" else ())


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
