"""The last complete step: remembered so that it can be saved when the loop ends, however it ends."""

from __future__ import annotations

import functools
import logging
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

from dcpsvc.errors import CheckpointGoneError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from dcpsvc.pending import PendingSave
    from dcpsvc.state.app import AppState
    from dcpsvc.state.collected import Collected


MAX_VALUES_NBYTES = 4 << 20
"""Larger values, such as an EMA copy of the model, are not copied at every step."""


class LastStep:
    """What step N was, kept until step N+1 is complete.

    An exception in the middle of step N+1 finds the model as it was after N, unless the optimizer has run; the
    generators, the loader and the counters have moved on, so copies of those are kept.

    Args:
        state: Of the job.
        rank: This rank.
        root: URL of the run root, for errors.

    Attributes:
        step: The last step told, or resumed; None before the first.
        saved: The last step that a save was begun for, or that was resumed.
        wanted: Whether it is to be saved at the end.
    """

    def __init__(self, state: AppState, rank: int, root: str) -> None:
        self._state, self._rank, self._root = state, rank, root
        self._lock = threading.Lock()
        self._late: list[Future[None]] = []
        self._pending: PendingSave | None = None
        self._moved = False
        self._versions: tuple[int, ...] = ()
        self._watched: list[Optimizer] = []
        self._hooks: list[RemovableHandle] = []
        self.step: int | None = None
        self.saved: int | None = None
        self.wanted = True
        self.metrics: dict[str, float] = {}
        self.values: Collected | None = None

    def tell(self, step: int) -> None:
        """The step is complete.

        Raises:
            ConfigError: It is not larger than the one before.
        """
        if self.step is not None and step <= self.step:
            raise ConfigError(f"step({step}) after step {self.step}: steps must grow")
        self._go_on_to(step)

    def note(self, metrics: Mapping[str, float] | None) -> None:
        """The step that was told was not saved. Training thread; copies small values only; never raises."""
        with self._lock:  # what came late is there already, and counts
            self.metrics, self.values = {**(metrics or {}), **self.metrics}, None
        self._watch_optimizers()
        self._moved = False
        self._versions = self._state.versions()
        try:
            self.values = self._state.collect_values(self._rank, max_nbytes=MAX_VALUES_NBYTES)
        except Exception as err:  # noqa: BLE001 - a step that saves nothing must not fail; the save reports it
            logging.getLogger("dcpsvc").debug("values of the last step are not kept: %s", err)

    def add(self, step: int, metrics: Mapping[str, float]) -> Future[None] | None:
        """Metrics that come late, for the step that was told last. Any thread.

        Returns:
            Done when a save of that step is committed; holds a CheckpointGoneError if none is begun before the next
            step. None: it is another step, or a save of it was begun.
        """
        with self._lock:
            if step != self.unsaved or self.begun(step) is not None:
                return None
            self.metrics = {**self.metrics, **metrics}
            promise: Future[None] = Future()
            promise.set_running_or_notify_cancel()
            self._late.append(promise)
            return promise

    def take(self, pending: PendingSave) -> Mapping[str, float]:
        """The metrics of its step so far, for a save that begins now: what comes from here on waits for it."""
        with self._lock:
            if pending.step != self.unsaved:
                return {}
            self._pending, late, self._late = pending, self._late, []
        for promise in late:
            pending.committed.add_done_callback(functools.partial(_follow, promise))
        return self.metrics

    def begun(self, step: int) -> PendingSave | None:
        """The save of that step which took its metrics, if there is one."""
        return self._pending if self._pending is not None and self._pending.step == step else None

    def begin_at(self, step: int) -> None:
        """Training continues after this step, which is a checkpoint."""
        self._go_on_to(step)
        self.saved = step

    def save_begun(self, step: int) -> None:
        """The step is being saved."""
        self.saved, self.values = step, None

    @property
    def unsaved(self) -> int | None:
        """The last step, if no save was begun for it and it is wanted."""
        if not self.wanted or self.step is None or (self.saved is not None and self.step <= self.saved):
            return None
        return self.step

    def obstacle(self, *, in_a_step: bool) -> str:
        """Why the state no longer is what it was when the step was noted; empty if it can be saved.

        Args:
            in_a_step: The loop ended in the middle of the next step, so values have moved on.
        """
        if self._moved or self._versions != self._state.versions():
            return "the model was changed after step() was told of it"
        if in_a_step and self.values is None:
            return "its values (loaders, generators, ...) are too large to be kept at every step, and have moved on"
        return ""

    def end(self) -> None:
        """Nothing is saved any more."""
        self._go_on_to(self.step)
        self.close()

    def _go_on_to(self, step: int | None) -> None:
        """In one move, so that nothing late of the step before is taken for this one's."""
        with self._lock:
            late, gone = self._late, self.step or 0
            self._late, self.step, self.metrics = [], step, {}
        for promise in late:
            promise.set_exception(CheckpointGoneError(self._root, gone, "no save of it was begun"))

    def _watch_optimizers(self) -> None:
        """Values of the state may be replaced; the optimizers watched must be those of now."""
        optimizers = self._state.optimizers()
        if [id(optimizer) for optimizer in optimizers] == [id(optimizer) for optimizer in self._watched]:
            return
        self.close()
        self._watched = optimizers
        self._hooks = [optimizer.register_step_pre_hook(self._on_optimizer_step) for optimizer in optimizers]

    def close(self) -> None:
        """Leave the optimizers alone."""
        for hook in self._hooks:
            hook.remove()

    def _on_optimizer_step(self, *_: object) -> None:
        self._moved = True


def _follow(promise: Future[None], committed: Future[None]) -> None:
    """Metrics that are in the manifest are there when it is."""
    error = committed.exception()
    if error is None:
        promise.set_result(None)
    else:
        promise.set_exception(error)
