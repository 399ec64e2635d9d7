"""One checkpoint in full: shards, tensors, metrics, versions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import NoSuchStepError
from dcpsvc.stages import discover

if TYPE_CHECKING:
    from dcpsvc.format.layout import Layout
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.stages.discover import Checkpoint
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

    def document(self) -> dict[str, Any]:
        """Everything as JSON-like values."""
        tensors = {
            key: {
                "dtype": t.dtype,
                "shape": list(t.shape),
                "nbytes": t.nbytes,
                "ranks": sorted({c.rank for c in t.chunks}),
            }
            for key, t in sorted(self.layout.tensors.items())
        }
        return listed(self.checkpoint) | {
            "run_id": self.manifest.run_id,
            "versions": self.manifest.versions,
            "layout": self.manifest.layout.path,
            "shards": [shard.to_json() for shard in self.manifest.shards],
            "tensors": tensors,
            "aliases": self.layout.aliases,
        }


def show(store: Store, step: int, attempt: str | None = None) -> Shown:
    """Describe the committed checkpoint of a step; with several attempts the newest, or the one named.

    Raises:
        NoSuchStepError: There is no such commit, or it is damaged.
        LayoutError: Its layout does not validate.
    """
    everything = discover.listing(store)
    found = [c for c in everything if c.step == step and attempt in {None, c.attempt}]
    whole = [c for c in found if c.state == "committed"]
    if not whole:
        reasons = "; ".join(f"attempt {c.attempt}: {c.reason}" for c in found)
        raise NoSuchStepError(store.url, step, tuple(c.step for c in everything if c.state == "committed"), reasons)
    manifest = discover.read_manifest(store, whole[-1].key)
    return Shown(whole[-1], manifest, discover.read_layout(store, manifest))


def _number(value: float) -> float | str:
    return value if value - value == 0 else str(value)
