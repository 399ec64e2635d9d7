"""What differs between two checkpoints: names, dtypes, shapes and plain values, and the tensors' numbers if asked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dcpsvc.deletions import noticed
from dcpsvc.format.shardfile import of_components
from dcpsvc.leases import held
from dcpsvc.storage.shards import VerifiedShard
from dcpsvc.storage.threads import at_once, each
from dcpsvc.tools import numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dcpsvc.format.layout import Layout, Tensor
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.storage.base import Store


class Side:
    """One of the two checkpoints.

    Args:
        store: Its run root.
        manifest: What was committed.
        layout: Where its tensors lie.
    """

    def __init__(self, store: Store, manifest: Manifest, layout: Layout) -> None:
        self.store = store
        self.manifest, self.layout = manifest, layout
        self.shards = [VerifiedShard([store], record) for record in manifest.shards]

    def documents(self) -> dict[str, Any]:
        """The JSON values of all ranks, by dotted path."""
        flat: dict[str, Any] = {}
        for of_rank in each(VerifiedShard.documents, self.shards, at_once(self.store)):
            for name, document in of_components(of_rank).items():
                flat |= leaves(document, name)
        return flat


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What differs; A is the first checkpoint, B the second.

    Attributes:
        only_a: Tensors that B lacks.
        only_b: Tensors that A lacks.
        changed: Tensors of another dtype or shape, and what changed.
        plain: JSON values that differ: path, A's, B's; None for one that is not there.
        values: Tensors whose numbers differ; filled only if they were compared.
        equal: How many tensors were compared and are the same, bit for bit.
        world_sizes: Ranks that wrote A and B.
    """

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    changed: tuple[tuple[str, str], ...]
    plain: tuple[tuple[str, Any, Any], ...]
    world_sizes: tuple[int, int]
    values: tuple[numbers.Gap, ...] = ()
    equal: int = 0

    @property
    def same(self) -> bool:
        """Whether nothing differs of what was compared. How many ranks wrote it does not count."""
        return not (self.only_a or self.only_b or self.changed or self.plain or self.values)

    def document(self) -> dict[str, Any]:
        """Everything as JSON-like values."""
        return asdict(self) | {"same": self.same}


@dataclass(slots=True)
class _Tensors:
    only_a: list[str] = field(default_factory=list[str])
    only_b: list[str] = field(default_factory=list[str])
    changed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    alike: list[str] = field(default_factory=list[str])


def compare(a: Side, b: Side, progress: Callable[[int], None] | None = None) -> Difference:
    """Compare two checkpoints, whatever the number of ranks that wrote them.

    Args:
        a: The first.
        b: The second.
        progress: Compare the tensors' numbers too, and call this with the number of bytes just compared (of A).

    Raises:
        CorruptShardError: A checkpoint is damaged.
        StepDeletedError: One was deleted meanwhile.
        StoreError: A store does not answer.
    """
    found = _compare_tensors(a.layout, b.layout)
    gaps: list[numbers.Gap] = []
    if progress is not None:
        with held(a.store, a.manifest.key), held(b.store, b.manifest.key):
            gaps = [_gap(name, a, b, progress) for name in found.alike]
    with noticed(a.store, a.manifest.key), noticed(b.store, b.manifest.key):
        plain = _compare_plain(a.documents(), b.documents())
    return Difference(
        only_a=tuple(found.only_a),
        only_b=tuple(found.only_b),
        changed=tuple(found.changed),
        plain=tuple(plain),
        world_sizes=(a.manifest.world_size, b.manifest.world_size),
        values=tuple(gap for gap in gaps if gap.differing),
        equal=sum(not gap.differing for gap in gaps),
    )


def compared_nbytes(a: Side, b: Side) -> int:
    """What comparing the numbers will read of A."""
    return sum(a.layout.tensors[name].nbytes for name in _compare_tensors(a.layout, b.layout).alike)


def leaves(document: Any, path: str) -> dict[str, Any]:
    """A JSON document by dotted path; tagged values (``{"$tuple": ...}``) stay whole."""
    if isinstance(document, dict) and not any(name.startswith("$") for name in document):
        items = list(document.items())
    elif isinstance(document, list) and any(isinstance(item, dict | list) for item in document):
        items = list(enumerate(document))
    else:
        return {path: document}
    flat: dict[str, Any] = {}
    for name, item in items:
        flat |= leaves(item, f"{path}.{name}")
    return flat


def _compare_tensors(a: Layout, b: Layout) -> _Tensors:
    found = _Tensors()
    names_a, names_b = a.names(), b.names()
    found.only_a, found.only_b = sorted({*names_a} - {*names_b}), sorted({*names_b} - {*names_a})
    for name in sorted({*names_a} & {*names_b}):
        mine, theirs = a.find(name), b.find(name)
        if mine is None or theirs is None:
            continue
        if change := _change(mine, theirs):
            found.changed.append((name, change))
        elif name in a.tensors:  # an alias is compared as what it stands for
            found.alike.append(name)
    return found


def _change(a: Tensor, b: Tensor) -> str:
    dtype = "" if a.dtype == b.dtype else f"{a.dtype} -> {b.dtype}"
    shape = "" if a.shape == b.shape else f"{list(a.shape)} -> {list(b.shape)}"
    return ", ".join(part for part in (dtype, shape) if part)


def _compare_plain(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(path, a.get(path), b.get(path)) for path in sorted({*a, *b}) if a.get(path) != b.get(path)]


def _gap(name: str, a: Side, b: Side, progress: Callable[[int], None]) -> numbers.Gap:
    mine, theirs = a.layout.tensors[name], b.layout.find(name)
    assert theirs is not None  # noqa: S101 - it is in both
    return numbers.compare(name, (mine, a.shards), (theirs, b.shards), progress)
