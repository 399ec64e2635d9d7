"""What ``dcpsvc gc`` has found: what would go, from which tier and why, and what stays. Values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dcpsvc.tools.listing import REMOTE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcpsvc.format.keys import Attempt

CHECKPOINT, ATTEMPT, DAMAGED = "checkpoint", "attempt", "damaged"
LAYOUT, TOMBSTONE, LEASE, PROBE, ORPHAN = "layout", "tombstone", "lease", "probe", "orphan"


@dataclass(frozen=True, slots=True)
class Doomed:
    """An attempt that is to go with everything that lies beside it."""

    attempt: Attempt
    kind: str
    why: str
    nbytes: int
    tier: str = REMOTE

    def document(self) -> dict[str, Any]:
        """As JSON-like values."""
        named = {"step": self.attempt.step, "attempt": self.attempt.attempt}
        return {"kind": self.kind, "tier": self.tier, **named, "why": self.why, "nbytes": self.nbytes}


@dataclass(frozen=True, slots=True)
class Loose:
    """A single file that is to go."""

    key: str
    kind: str
    why: str
    nbytes: int
    tier: str = REMOTE

    def document(self) -> dict[str, Any]:
        """As JSON-like values."""
        return {"kind": self.kind, "tier": self.tier, "key": self.key, "why": self.why, "nbytes": self.nbytes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Going:
    """What would go from one tier.

    Attributes:
        doomed: Attempts, oldest first.
        loose: Files.
        unfinished: Uploads that writers which are no more have left half sent.
    """

    doomed: tuple[Doomed, ...] = ()
    loose: tuple[Loose, ...] = ()
    unfinished: int = 0

    @property
    def everything(self) -> tuple[Doomed | Loose, ...]:
        """All that would go."""
        return (*self.doomed, *self.loose)

    @property
    def nbytes(self) -> int:
        """What would be freed, as far as it can be told: unfinished uploads do not say how large they are."""
        return sum(one.nbytes for one in self.everything)

    @property
    def is_empty(self) -> bool:
        """Nothing is to go."""
        return not (self.doomed or self.loose or self.unfinished)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers(Going):
    """What would go from the run root, and what stays there.

    Attributes:
        policy: How the policy reads; empty if none is recorded.
        keep: Why each checkpoint stays.
        spared: What is no checkpoint and stays all the same, with the reason.
        remarks: What is odd about the policy, or could not be seen.
        limit_s: What was written later is too young, by the store's clock.
        users: By layout the doomed checkpoints that name it: it goes only if all of them went.
        sizes: Bytes of the attempts that stay, checkpoints or not.
    """

    policy: str
    keep: dict[Attempt, str]
    spared: dict[str, str]
    remarks: tuple[str, ...]
    limit_s: float
    users: Mapping[str, frozenset[Attempt]] = field(default_factory=dict[str, "frozenset[Attempt]"])
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def staying_nbytes(self) -> int:
        """Of all attempts that stay."""
        return sum(self.sizes.values())
