"""One checkpoint in full: shards, tensors, metrics, versions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from dcpsvc import deletions, sidefiles
from dcpsvc.commits import listed_metrics
from dcpsvc.errors import FormatError, NoSuchStepError, StoreNotFoundError, StoreObjectError
from dcpsvc.format import lineage
from dcpsvc.stages import discover
from dcpsvc.stages.discover import Checkpoint
from dcpsvc.storage.threads import at_once

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.layout import Layout, Tensor
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

    def tensors(self, pattern: str = "", dtype: str | None = None) -> dict[str, Tensor]:
        """Those whose name contains ``pattern``, or matches it where it has wildcards, by name."""
        found = sorted(self.layout.tensors.items())
        return {name: one for name, one in found if matches(name, pattern) and dtype in {None, one.dtype}}

    def aliases(self, pattern: str = "") -> dict[str, str]:
        """Further names of tied tensors, with the name that has the bytes."""
        return {name: of for name, of in sorted(self.layout.aliases.items()) if matches(name, pattern)}

    def document(self, pattern: str = "", dtype: str | None = None) -> dict[str, Any]:
        """Everything as JSON-like values; of the tensors those that :meth:`tensors` gives."""
        tensors = {
            key: {
                "dtype": t.dtype,
                "shape": list(t.shape),
                "nbytes": t.nbytes,
                "ranks": sorted({c.rank for c in t.chunks}),
            }
            for key, t in self.tensors(pattern, dtype).items()
        }
        return listed(self.checkpoint) | {
            "run_id": self.manifest.run_id,
            "versions": self.manifest.versions,
            "layout": self.manifest.layout.path,
            "adapter": None if self.manifest.adapter is None else self.manifest.adapter.to_json(),
            "shards": [shard.to_json() for shard in self.manifest.shards],
            "tensors": tensors,
            "aliases": self.layout.aliases,
            "lineage": None if self.lineage is None else str(self.lineage),
        }


def matches(name: str, pattern: str) -> bool:
    """Whether a name contains the text, or matches it as a whole if it has ``*``, ``?`` or ``[``."""
    return fnmatchcase(name, pattern) if set(pattern) & set("*?[") else pattern in name


def show(store: Store, step: int, attempt: str | None = None) -> Shown:
    """Describe the committed checkpoint of a step; with several attempts the newest, or the one named.

    Raises:
        NoSuchStepError: There is no such commit, or it is damaged.
        LayoutError: Its layout does not validate.
    """
    return describe(store, find(store, step, attempt))


def describe(store: Store, manifest: Manifest) -> Shown:
    """What a checkpoint says about itself.

    Raises:
        LayoutError: Its layout does not validate.
        StepDeletedError: It was deleted meanwhile.
    """
    layout = layout_of(store, manifest)
    checkpoint = Checkpoint(
        step=manifest.step,
        attempt=manifest.attempt,
        created=discover.created(manifest),
        nbytes=manifest.nbytes,
        world_size=manifest.world_size,
        metrics=listed_metrics(sidefiles.metrics_of(store, manifest)),
    )
    return Shown(checkpoint, manifest, layout, lineage_of(store, manifest.key))


def layout_of(store: Store, manifest: Manifest) -> Layout:
    """Where its tensors lie; raises as :func:`describe` does."""
    with deletions.noticed(store, manifest.key):
        return discover.read_layout(store, manifest)


def find(store: Store, step: int, attempt: str | None = None) -> Manifest:
    """The newest whole commit of a step, or the one named; others are not even read.

    Raises:
        NoSuchStepError: There is no such commit, or it is damaged.
        StepDeletedError: It is being deleted, or, as that says, never was committed.
    """
    everything = discover.committed(store)
    wanted = [one for one in everything if one.step == step and attempt in {None, one.attempt}]
    _check_attempt(store, everything, step, attempt)
    reasons: list[str] = []
    for one in discover.newest_first(store, wanted):
        try:
            return discover.valid(store, one)
        except FormatError as err:
            reasons.append(f"attempt {one.attempt}: {err}")
    deletions.check_step(store, step, attempt, wanted)
    if not wanted:
        reasons = [
            f"attempt {one.attempt}: {one.reason}"
            for one in discover.listing(store, at_once=at_once(store))
            if one.step == step and attempt in {None, one.attempt}
        ]
    raise NoSuchStepError(store.url, step, tuple(sorted({one.step for one in everything})), "; ".join(reasons))


def _check_attempt(store: Store, everything: Sequence[Attempt], step: int, attempt: str | None) -> None:
    there = tuple(one.attempt for one in everything if one.step == step)
    if there and attempt is not None and attempt not in there:
        steps = tuple(sorted({one.step for one in everything}))
        raise NoSuchStepError(store.url, step, steps, f"has no committed attempt {attempt}", there)


def lineage_of(store: Store, attempt: Attempt) -> Lineage | None:
    """Where a checkpoint comes from; None if training wrote it, or if the note is damaged: nothing depends on it."""
    try:
        return lineage.loads(attempt.lineage, store.get(attempt.lineage, max_nbytes=lineage.MAX_NBYTES))
    except (FormatError, StoreNotFoundError, StoreObjectError):
        return None


def _number(value: float) -> float | str:
    return value if value - value == 0 else str(value)
