"""One accepted save on its way, as the training thread hands it to the uploader."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Future

    from dcpsvc.errors import RankFailure
    from dcpsvc.format.keys import Attempt
    from dcpsvc.pending import PendingSave
    from dcpsvc.stages import ack
    from dcpsvc.stages.shard import ShardWriter
    from dcpsvc.stages.stage import ArenaStager


@dataclass(slots=True, kw_only=True)
class Save:
    """One accepted save on its way.

    Attributes:
        key: Step and attempt.
        pending: What the training loop holds.
        began: When it was accepted, on the performance counter.
        proposal: What this rank brings to the ranks; a failure if it could not stage.
        stager: Holds the gate; None if staging failed.
        writer: Holds the record once written.
        written: DCP's future.
        may_exist: From here on the coordinator may have written the manifest: nothing may be deleted any more,
            and not knowing is not the same as failing.
    """

    key: Attempt
    pending: PendingSave
    began: float
    proposal: ack.Proposal | RankFailure
    stager: ArenaStager | None = None
    writer: ShardWriter | None = None
    written: Future[Any] | None = None
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
