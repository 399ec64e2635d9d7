"""A step is complete: it is saved if the schedule or the ranks together say so, and else remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc.errors import WaitTimeoutError
from dcpsvc.pending import StepOutcome
from dcpsvc.ranks.proposals import SAVE, STOP

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcpsvc.announcing import Announcer
    from dcpsvc.catalog import Catalog
    from dcpsvc.config import Options
    from dcpsvc.laststep import LastStep
    from dcpsvc.pending import PendingSave
    from dcpsvc.saves import Saves
    from dcpsvc.saving import Saver
    from dcpsvc.steering import Steering


@dataclass(slots=True, kw_only=True)
class Stepping:
    """Decides, at each step, as every rank does. Training thread."""

    options: Options
    catalog: Catalog
    saver: Saver
    saves: Saves
    last: LastStep
    steering: Steering
    announcer: Announcer

    def complete(self, step: int, metrics: Mapping[str, float]) -> StepOutcome:
        """What :meth:`~dcpsvc.checkpointer.Checkpointer.step` says.

        Args:
            step: The one that was told last.
            metrics: For a manifest of it.
        """
        agreed = self.steering.at(step)
        due = self._is_due(step, agreed) and step != self.last.saved
        pending = self._save(step, metrics, must=agreed is not None) if due else None
        if agreed is not None:
            begun = self.saves.last
            self.steering.tell(step, agreed, begun if begun is not None and begun.step == step else None)
            self.last.wanted = agreed in {SAVE, STOP}
        if self.last.unsaved == step:
            self.last.note(metrics)
            self.saver.prepare_once(self.last.values)
        return StepOutcome(step=step, pending=pending, should_stop=bool(self.steering.stopping))

    def _is_due(self, step: int, agreed: str | None) -> bool:
        """What the ranks agreed on goes before the schedule."""
        every = self.options.every
        return agreed in {SAVE, STOP} if agreed is not None else every is not None and every.due(step)

    def _save(self, step: int, metrics: Mapping[str, float], *, must: bool) -> PendingSave | None:
        self.saves.check_new(step)
        try:
            return self.saves.begin(step, metrics, must=must, left_s=self.steering.left_s())
        except WaitTimeoutError as err:  # a preemption whose time is over: training has to end
            self.announcer.cut_short(err.pending, self.catalog.newest_local)
            return None
