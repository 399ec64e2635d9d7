"""One checkpoint in full: shards, tensors, metrics, versions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import FormatError, NoSuchStepError, StoreNotFoundError, StoreObjectError
from dcpsvc.format import lineage
from dcpsvc.reading import at_once
from dcpsvc.stages import discover
from dcpsvc.stages.discover import Checkpoint

if TYPE_CHECKING:
    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.layout import Layout
    from dcpsvc.format.lineage import Lineage
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.storage.base import Store


def listed(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint of a listing as JSON-like values."""
    document = asdict(checkpoint)
    document["created"] = checkpoint.created and checkpoint.created.isoformat()
    document["metrics"] = {name: _number(value) for name, value in checkpoint.metrics.items()}
    return document


@dataclass(frozen=True, slots=True)
class Shown:
    """A checkpoint with all it says about itself."""

    checkpoint: Checkpoint
    manifest: Manifest
    layout: Layout
    lineage: Lineage | None = None

    def document(self, pattern: str = "") -> dict[str, Any]:
        """Everything as JSON-like values; only tensors whose name contains ``pattern``."""
        tensors = {
            key: {
                "dtype": t.dtype,
                "shape": list(t.shape),
                "nbytes": t.nbytes,
                "ranks": sorted({c.rank for c in t.chunks}),
            }
            for key, t in sorted(self.layout.tensors.items())
            if pattern in key
        }
        return listed(self.checkpoint) | {
            "run_id": self.manifest.run_id,
            "versions": self.manifest.versions,
            "layout": self.manifest.layout.path,
            "shards": [shard.to_json() for shard in self.manifest.shards],
            "tensors": tensors,
            "aliases": self.layout.aliases,
            "lineage": None if self.lineage is None else str(self.lineage),
        }


def show(store: Store, step: int, attempt: str | None = None) -> Shown:
    """Describe the committed checkpoint of a step; with several attempts the newest, or the one named.

    Raises:
        NoSuchStepError: There is no such commit, or it is damaged.
        LayoutError: Its layout does not validate.
    """
    manifest = find(store, step, attempt)
    checkpoint = Checkpoint(
        step=manifest.step,
        attempt=manifest.attempt,
        created=discover.created(manifest),
        nbytes=manifest.nbytes,
        world_size=manifest.world_size,
        metrics=manifest.metrics,
    )
    return Shown(checkpoint, manifest, discover.read_layout(store, manifest), lineage_of(store, manifest.key))


def find(store: Store, step: int, attempt: str | None = None) -> Manifest:
    """The newest whole commit of a step, or the one named; others are not even read.

    Raises:
        NoSuchStepError: There is no such commit, or it is damaged.
    """
    everything = discover.committed(store)
    wanted = [one for one in everything if one.step == step and attempt in {None, one.attempt}]
    reasons: list[str] = []
    for one in discover.newest_first(store, wanted):
        try:
            return discover.valid(store, one)
        except FormatError as err:
            reasons.append(f"attempt {one.attempt}: {err}")
    if not wanted:
        reasons = [
            f"attempt {one.attempt}: {one.reason}"
            for one in discover.listing(store, at_once=at_once(store))
            if one.step == step and attempt in {None, one.attempt}
        ]
    raise NoSuchStepError(store.url, step, tuple(sorted({one.step for one in everything})), "; ".join(reasons))


def lineage_of(store: Store, attempt: Attempt) -> Lineage | None:
    """Where a checkpoint comes from; None if training wrote it, or if the note is damaged: nothing depends on it."""
    try:
        return lineage.loads(attempt.lineage, store.get(attempt.lineage, max_nbytes=lineage.MAX_NBYTES))
    except (FormatError, StoreNotFoundError, StoreObjectError):
        return None


def _number(value: float) -> float | str:
    return value if value - value == 0 else str(value)
