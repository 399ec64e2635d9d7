"""What can go wrong, and how often: drawn anew for each seed, so that no two schedules fail in the same mixture.

Each seed enables some of the kinds only (a bug may need three crashes and nothing else, which a mixture of everything
would drown), and strikes after a random number of operations of each category. Besides, each seed curses some switch
points: there it strikes whatever the odds, so that what happens seldom is not hit seldom.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

KINDS: dict[str, tuple[str, ...]] = {
    # the ranks' own key-value store
    "kv-read": ("crash", "freeze", "partition", "refused", "slow", "host-down"),
    "kv-write": ("crash", "freeze", "partition", "refused", "lost", "slow", "host-down"),
    # collectives of our own
    "group": ("crash", "freeze", "broken", "slow"),
    # the run root
    "read": ("crash", "freeze", "transient", "permanent", "never", "slow", "host-down"),
    "list": ("crash", "freeze", "transient", "permanent", "never", "slow", "stale"),
    "create": (
        "crash", "freeze", "transient", "lost", "permanent", "full", "late", "late-lost", "never", "exists", "slow",
        "host-down",
    ),
    "put": (
        "crash", "freeze", "transient", "lost", "permanent", "full", "late", "late-lost", "never", "truncated", "slow",
        "host-down",
    ),
    "delete": ("crash", "freeze", "transient", "lost", "permanent", "late", "late-lost", "never", "slow"),
    # the run root, while an upload that was cut short is being finished
    "recovery": ("crash", "freeze", "transient", "lost", "permanent", "late", "late-lost", "never", "slow"),
    # the node's own disk
    "disk-read": ("crash", "freeze", "refused", "slow"),
    "disk-write": ("crash", "freeze", "refused", "full", "slow", "host-down"),
    "shard": ("crash", "freeze", "refused", "full", "memory", "exit", "slow", "never"),
    # a labelled point of a checkpoint's life
    "point": ("crash", "freeze", "host-down"),
    # what a rank does with one save
    "save": (
        "crash", "freeze", "skips", "late", "other-step", "other-structure", "staging", "dropped", "abandoned",
        "no-room", "little-room",
    ),
}  # fmt: skip

_MEAN_OPERATIONS = {
    "kv-read": 800, "kv-write": 80, "group": 10, "read": 30, "list": 30, "create": 10, "put": 4, "delete": 2,
    "recovery": 8, "disk-read": 80, "disk-write": 20, "shard": 5, "point": 50, "save": 8,
}  # fmt: skip


_CRITICAL = frozenset({
    "remote.create manifests", "remote.get manifests", "remote.create tombstones", "remote.create inheritance",
    "kv.compare_set commit/verdict", "kv.set commit",
})  # fmt: skip
"""Where a mistake would cost a checkpoint: cursed more often."""


class Faults:
    """Strikes now and then.

    Attributes:
        stale_listings: Listings of this schedule may lie a little behind.
        left: Strikes that are still allowed; none at all in a calm schedule.
        calm: How many wish for quiet at this moment.
    """

    def __init__(self, source: random.Random) -> None:
        self._random = source
        kinds = sorted({kind for kinds in KINDS.values() for kind in kinds})
        share = source.choice((0.2, 0.4, 0.7, 1.0))
        enabled = {kind for kind in kinds if source.random() < share}
        self.stale_listings = "stale" in enabled and source.random() < 0.5
        if not self.stale_listings:
            enabled.discard("stale")
        self.left = source.choice((0, 1, 1, 2, 3, 4, 6, 10, 20, 40))
        self.intensity = source.choice((0.3, 1.0, 2.0, 4.0))
        self._cursed_share = source.choice((0.0, 0.03, 0.08, 0.15))
        self._curses: dict[str, int] = {}
        self._kinds = {category: [kind for kind in KINDS[category] if kind in enabled] for category in KINDS}
        self._next = {category: self._gap(category) for category in KINDS}
        self.count: Counter[str] = Counter()
        self.crash_points: Counter[str] = Counter()
        self.calm = 0
        self._hindrances = [] if source.random() < 0.6 else [source.randint(1, 12) for _ in range(source.randint(1, 3))]
        self._mercy = source.choice((0, 0, 2, 4, 8, 16))

    def strike(self, category: str, label: str | None = None) -> str | None:
        """What goes wrong with the operation that begins now; nearly always nothing."""
        if category == "recovery" and self._hinders():
            return self._counted(category, KINDS[category])
        if self._mercy > 0 or self.calm:
            return None
        self._next[category] = left = self._next[category] - 1
        if left > 0 and (label is None or not self._is_cursed(label)):
            return None
        if left <= 0:
            self._next[category] = self._gap(category)
        kinds = self._kinds[category]
        if self.left <= 0 or not kinds:
            return None
        self.left -= 1
        return self._counted(category, kinds)

    def advance(self) -> None:
        """A save has begun on some rank: in many schedules nothing goes wrong before a few have."""
        self._mercy -= 1

    def _counted(self, category: str, kinds: Sequence[str]) -> str:
        kind = self._random.choice(kinds)
        self.count[f"{category}: {kind}"] += 1
        return kind

    def _hinders(self) -> bool:
        """In many schedules some call of the first recoveries fails for sure: they are few, and short."""
        if not self._hindrances or self.calm:
            return False
        self._hindrances[0] -= 1
        if self._hindrances[0] > 0:
            return False
        del self._hindrances[0]
        return True

    def _is_cursed(self, label: str) -> bool:
        """At one of the first visits to some points."""
        visits = self._curses.get(label)
        if visits is None:
            share = self._cursed_share * (3 if label in _CRITICAL else 1)
            visits = self._random.randint(1, 5) if self._random.random() < share else 0
        self._curses[label] = visits - 1
        return visits == 1

    def _gap(self, category: str) -> int:
        return 1 + int(self._random.expovariate(self.intensity / _MEAN_OPERATIONS[category]))
