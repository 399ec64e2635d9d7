"""What a run takes: bytes by checkpoint, by component, and by what is not (yet, or any more) a checkpoint."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import FormatError
from dcpsvc.format import keys
from dcpsvc.stages import discover
from dcpsvc.storage.posix import PosixStore
from dcpsvc.tools.changes import component

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Entry, Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Bytes of one run.

    Attributes:
        checkpoints: Each commit's shards, ascending by step.
        debris: Shards of attempts that are no checkpoint: a save under way, or one that failed.
        components: Of the newest commit that is whole: tensors by the name in the state.
        kinds: Everything at the run root by kind: ``checkpoints``, ``debris``, ``manifests``, ``layouts``, ``other``.
        local: Everything on this node's disk.
    """

    checkpoints: tuple[tuple[int, str, int], ...]
    debris: tuple[tuple[int, str, int], ...]
    components: dict[str, int]
    kinds: dict[str, int]
    local: int

    @property
    def total(self) -> int:
        """At the run root."""
        return sum(self.kinds.values())

    def document(self) -> dict[str, Any]:
        """Everything as JSON-like values."""
        named = ("step", "attempt", "nbytes")
        return asdict(self) | {
            "checkpoints": [dict(zip(named, each, strict=True)) for each in self.checkpoints],
            "debris": [dict(zip(named, each, strict=True)) for each in self.debris],
            "total": self.total,
        }


def measure(store: Store, local_path: Path | None = None) -> Usage:
    """Add everything up: two LISTs, one manifest and one layout.

    Raises:
        StoreError: The listing failed.
    """
    committed = discover.committed(store)
    entries = store.list("")
    by_attempt, kinds = _sum(entries, set(committed))
    rows = sorted(by_attempt.items())
    return Usage(
        checkpoints=tuple((one.step, one.attempt, nbytes) for one, nbytes in rows if one in committed),
        debris=tuple((one.step, one.attempt, nbytes) for one, nbytes in rows if one not in committed),
        components=_components(store, committed),
        kinds=kinds,
        local=0 if local_path is None else sum(entry.nbytes for entry in PosixStore(local_path).list("")),
    )


def _sum(entries: Iterable[Entry], committed: set[Attempt]) -> tuple[dict[Attempt, int], dict[str, int]]:
    by_attempt: defaultdict[Attempt, int] = defaultdict(int)
    kinds: dict[str, int] = dict.fromkeys(("checkpoints", "debris", "manifests", "layouts", "other"), 0)
    for key, nbytes in entries:
        if (attempt := keys.attempt_below(key)) is not None:
            by_attempt[attempt] += nbytes
            kinds["checkpoints" if attempt in committed else "debris"] += nbytes
        elif key.startswith(keys.MANIFESTS):
            kinds["manifests"] += nbytes
        else:
            kinds["layouts" if keys.is_layout(key) else "other"] += nbytes
    return dict(by_attempt), kinds


def _components(store: Store, committed: Iterable[Attempt]) -> dict[str, int]:
    for attempt in discover.newest_first(store, committed):
        try:
            layout = discover.read_layout(store, discover.read_manifest(store, attempt))
        except FormatError:
            continue
        nbytes: Counter[str] = Counter()
        for name, tensor in layout.tensors.items():
            nbytes[component(name)] += tensor.nbytes
        return dict(nbytes.most_common())
    return {}
