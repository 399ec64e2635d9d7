"""The last complete step: remembered so that it can be saved when the loop ends, however it ends."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from dcpsvc.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcpsvc.state.app import AppState
    from dcpsvc.state.collected import Collected


class LastStep:
    """What step N was, kept until step N+1 is complete.

    An exception in the middle of step N+1 finds the model as it was after N, unless the optimizer has run; the
    generators, the loader and the counters have moved on, so copies of those are kept.
    """

    def __init__(self, state: AppState, rank: int) -> None:
        self._state, self._rank = state, rank
        self._moved = False
        self._versions: tuple[int, ...] = ()
        self._hooks = [optimizer.register_step_pre_hook(self._on_optimizer_step) for optimizer in state.optimizers()]
        self.metrics: dict[str, float] = {}
        self.values: Collected | None = None

    def note(self, metrics: Mapping[str, float] | None) -> None:
        """The step is complete and was not saved. Training thread; copies small values only."""
        self.metrics = dict(metrics or {})
        self._moved = False
        self._versions = self._state.versions()
        with contextlib.suppress(StateError):  # what cannot be saved is reported by the save, with its key
            self.values = self._state.collect_values(self._rank)

    def forget(self) -> None:
        """The step is being saved."""
        self.values = None

    @property
    def is_intact(self) -> bool:
        """Whether the model still is what it was when the step was noted."""
        return not self._moved and self._versions == self._state.versions()

    def close(self) -> None:
        """Leave the optimizers alone."""
        for hook in self._hooks:
            hook.remove()

    def _on_optimizer_step(self, *_: object) -> None:
        self._moved = True
