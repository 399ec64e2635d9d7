"""What a seed decides before anything happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from dcpsvc.policies import Everything, Keep, Latest

if TYPE_CHECKING:
    import random

_MOST_RANKS = 4
_AMBUSHES = (
    *("remote.create manifests",) * 5,
    *("remote.create tombstones", "kv.compare_set commit/verdict") * 3,
    *("remote.list epochs", "remote.list manifests", "remote.delete manifests", "remote.list data") * 2,
    "point acked-remote", "point manifest-created", "point committed", "point retained", "point uploaded",
    "kv.compare_set retain/verdict", "kv.compare_set inherit/verdict",
    "remote.create epochs", "remote.create inheritance", "remote.get inheritance", "remote.get manifests",
    "remote.list tombstones", "remote.delete tombstones", "remote.put_file data", "remote.delete data",
)  # fmt: skip
"""Where a coordinator is held up for a while, and the next job begins meanwhile."""

EXPIRY = "expiry"
_DUELS = (
    *("remote.list manifests", "remote.create manifests", "remote.delete tombstones") * 2,
    *("kv.compare_set inherit/verdict",) * 2,
    "remote.create epochs", "remote.create inheritance", "remote.list epochs", "remote.list tombstones",
    "remote.delete manifests", "remote.put_file data", "remote.delete data", "point resumed", "point committed",
)  # fmt: skip
"""Where the next coordinator stops then, until the one held up goes on, and a moment more. An expiry stops nobody."""

_DUELS_ABOUT_A_MANIFEST = (EXPIRY, EXPIRY, "remote.create inheritance", "remote.create inheritance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one start of the job is to do.

    Attributes:
        token: Its name.
        world_size: Its ranks.
        saves: How many saves each rank tries.
        keep: The retention policy.
        keep_local: Of each rank on its disk.
        spoiled: Which of the saves fails, because the run root does not take what rank 1 sends; 0: none.
        steps_back: Resumes by name from an older commit.
        patient: Waits at the end until everything that went wrong is over, and saves once more.
        must_succeed: Nothing goes wrong any more, so every save must be committed.
    """

    token: str
    world_size: int
    saves: int
    keep: Keep
    keep_local: int
    spoiled: int = 0
    steps_back: bool = False
    patient: bool = False
    must_succeed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The job, the machines and the mishaps of one history.

    Attributes:
        grain: How often another thread may run before a read of the ranks' store.
        retrying: Transient errors of the run root are tried again, as for most users.
        atomic_create: Of several creators of one object exactly one wins.
        keep_newest: The retention policy; None: everything.
        keep_local: Attempts that each rank leaves on its disk.
        ranks_per_node: They share a disk, and go down together.
        world_size: Of most starts.
        most_starts: Before the last one, in which nothing goes wrong.
        changes_structure: The state changes its structure now and then.
        has_folders: A folder of PEFT is part of each checkpoint.
        splits: How likely a start is followed by the next one while it still runs.
        ambush: Where the coordinator is held up while the next start begins; empty: nowhere.
        ambush_after: At which of its visits there.
        spoils: In some starts a save fails for sure.
        duel: Where the next one's coordinator meets it; empty: it is not met, and goes on after a while.
        duel_after: At which of its visits there.
        shares_nodes: A new start may use a machine on which ranks of an old one still run.
        steps_back: How likely a start resumes by name from an older commit.
        patience: How likely a start waits at its end until everything has healed, and saves again.
        raids: How likely all ranks of a start are killed at once.
        desertion: How likely a rank dies of a failed save before it has tidied up.
        fragile_store: The ranks' store dies with rank 0.
    """

    grain: float
    retrying: bool
    atomic_create: bool
    keep_newest: int | None
    keep_local: int
    ranks_per_node: int
    world_size: int
    most_starts: int
    changes_structure: bool
    splits: float
    ambush: str
    ambush_after: int
    spoils: bool
    duel: str
    duel_after: int
    shares_nodes: bool
    steps_back: float
    patience: float
    raids: float
    desertion: float
    fragile_store: bool
    has_folders: bool

    @classmethod
    def draw(cls, source: random.Random, *, stale_listings: bool) -> Self:
        """Some.

        Args:
            source: Of chance.
            stale_listings: Ownership rests on listings that show what was written, so then jobs do not overlap.
        """
        chance, choice = source.random, source.choice
        ambush = choice(_AMBUSHES) if chance() < 0.4 and not stale_listings else ""
        duels = _DUELS_ABOUT_A_MANIFEST if ambush == "remote.create manifests" and chance() < 0.7 else _DUELS
        duel = choice(duels) if ambush and chance() < 0.7 else ""
        is_rare = any(word in ambush for word in ("tombstones", "delete", "epochs", "inheritance"))
        return cls(
            grain=choice((0.05, 0.05, 0.3, 1.0)),
            retrying=chance() < 0.25,
            atomic_create=chance() < 0.8,
            keep_newest=choice((1, 1, 2) if duel == EXPIRY else (1, 1, 2, 2, 3, None)),
            keep_local=choice((1, 2)),
            ranks_per_node=choice((1, 1, 2)),
            world_size=choice((2, 2, 3, 4)),
            most_starts=choice((2, 3) if duel == EXPIRY else (1, 2, 2, 3) if ambush else (1, 1, 1, 2, 2, 3)),
            changes_structure=chance() < 0.2,
            splits=0.0 if stale_listings else choice((0.0, 0.2, 0.6, 0.9)),
            ambush=ambush,
            ambush_after=choice((1, 1, 1, 2) if is_rare else (1, 1, 2, 2, 3, 5)),
            spoils="tombstones" in ambush or "delete" in ambush,
            duel=duel,
            duel_after=choice((1, 1, 1, 2, 3)),
            shares_nodes=chance() < 0.15,
            steps_back=choice((0.0, 0.0, 0.0, 0.3)),
            patience=choice((0.0, 0.0, 0.5)),
            raids=choice((0.0, 0.0, 0.5)),
            desertion=choice((0.0, 0.5) if ambush else (0.0, 0.0, 0.0, 0.3)),
            fragile_store=chance() < 0.3,
            has_folders=chance() < 0.3,
        )

    @property
    def keep(self) -> Keep:
        """The retention policy."""
        return Everything() if self.keep_newest is None else Latest(self.keep_newest)

    def structure(self, step: int) -> str:
        """What the state of a step looks like."""
        return f"v{step // 2}" if self.changes_structure else "v0"

    def plan(self, source: random.Random, *, last: bool) -> Plan:
        """For one start."""
        return Plan(
            token=f"{source.getrandbits(32):08x}",
            world_size=self.world_size if source.random() < 0.7 else source.randint(2, _MOST_RANKS),
            saves=1 if last else source.choice((1, 2, 2, 3) if self.ambush else (1, 1, 2, 3)),
            keep=self.keep,
            keep_local=self.keep_local,
            spoiled=0 if last or not self.spoils else source.choice((0, 1, 1, 2)),
            steps_back=not last and source.random() < self.steps_back,
            patient=not last and source.random() < self.patience,
            must_succeed=last,
        )
