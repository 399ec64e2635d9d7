"""How a job is doing: the counters of ``statistics()``, and what ``dcpsvc status`` shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dcpsvc.pending import Statistics
from dcpsvc.ranks.proposals import SAVE
from dcpsvc.storage.tries import retries

if TYPE_CHECKING:
    from dcpsvc.announcing import Announcer
    from dcpsvc.catalog import Catalog
    from dcpsvc.laststep import LastStep
    from dcpsvc.saves import Saves
    from dcpsvc.settling import OpenRun
    from dcpsvc.steering import Steering
    from dcpsvc.uploader import Uploader


@dataclass(slots=True, kw_only=True)
class Standing:
    """Reads the parts of one Checkpointer; any thread.

    Attributes:
        resumed_from: Step that was loaded; None on a fresh run.
    """

    run: OpenRun
    world_size: int
    catalog: Catalog
    saves: Saves
    uploader: Uploader
    last: LastStep
    steering: Steering
    announcer: Announcer
    resumed_from: int | None = None
    _retried_before: int = field(default_factory=retries)

    def statistics(self) -> Statistics:
        """Counters so far."""
        uploader = self.uploader
        return Statistics(
            accepted=uploader.accepted,
            committed=uploader.committed,
            failed=uploader.failed,
            skipped=self.saves.skipped + uploader.skipped,
            consecutive_failures=uploader.consecutive_failures,
            blocked_s=self.saves.blocked_s,
            nbytes=uploader.nbytes,
            newest=self.catalog.newest,
            resumed_from=self.resumed_from,
            slowest=self.catalog.slowest,
            retries=retries() - self._retried_before,
            failures=tuple(uploader.failures),
        )

    def status(self) -> dict[str, Any]:
        """See :meth:`dcpsvc.control.Commands.status`."""
        under_way, agreed = self.uploader.under_way, self.steering.agreed
        in_flight = [{"step": save.key.step, "attempt": save.key.attempt, "phase": save.phase} for save in under_way]
        return asdict(self.statistics()) | {
            "root": self.run.remote.url,
            "local_path": str(self.run.local_path),
            "world_size": self.world_size,
            "step": self.last.step,
            "newest_local": self.catalog.newest_local,
            "in_flight": in_flight,
            "next_save": self.announcer.next_due(self.last.step or 0),
            "stop_step": agreed.step if agreed is not None and agreed.kind != SAVE else None,
        }
