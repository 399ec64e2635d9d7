"""One accepted save on its way, as the training thread hands it to the uploader."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dcpsvc.copying import Copying
    from dcpsvc.errors import RankFailure
    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.lateness import Slowest
    from dcpsvc.pending import PendingSave
    from dcpsvc.stages import ack
    from dcpsvc.state.replicas import Replicas


class Shard(Protocol):
    """This rank's shard on its way to the local disk."""

    @property
    def seconds(self) -> float:
        """Writing and syncing."""
        ...

    @property
    def ended(self) -> bool:
        """Nobody reads the staged bytes any more."""
        ...

    def open(self) -> None:
        """Every rank has arrived and agrees: write."""
        ...

    def refuse(self, error: BaseException) -> None:
        """The save has ended: what is not written yet never is."""
        ...

    def record(self, timeout_s: float) -> ShardRecord:
        """Wait until it is durable on the local tier; raises what went wrong."""
        ...


@dataclass(slots=True, kw_only=True)
class Save:
    """One accepted save on its way.

    Attributes:
        key: Step and attempt.
        pending: What the training loop holds.
        began: When it was accepted, on the performance counter.
        proposal: What this rank brings to the ranks; a failure if it could not stage.
        shard: None if staging failed.
        copying: What of the state is still being read.
        image: The shard's bytes up to its block table where they were staged, and perhaps still are.
        replicas: Hashes that this rank has still to say.
        phase: The last labelled point it came to.
        dropped: Why this save is given up; empty while it is wanted.
        keeps_files: What it has on disk stays when it is given up: the next start may finish it.
        slowest: The rank that the others waited for, once all have said what they took.
        may_exist: From here on the coordinator may have written the manifest: nothing may be deleted any more,
            and not knowing is not the same as failing.
    """

    key: Attempt
    pending: PendingSave
    began: float
    proposal: ack.Proposal | RankFailure
    shard: Shard | None = None
    copying: Copying | None = None
    image: memoryview | None = None
    replicas: Replicas | None = None
    phase: str = ""
    dropped: str = ""
    keeps_files: bool = False
    slowest: Slowest | None = None
    may_exist: bool = False

    @property
    def place(self) -> str:
        """Where the ranks meet about it."""
        return meeting_place(self.key)

    def elapsed_s(self) -> float:
        """Since it was accepted."""
        return time.perf_counter() - self.began


def meeting_place(attempt: Attempt) -> str:
    """Where the ranks meet about an attempt; a phase is added for each meeting."""
    return f"save/{attempt}"
