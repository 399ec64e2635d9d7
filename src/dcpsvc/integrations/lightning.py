"""A Lightning callback that saves and resumes through dcpsvc: ``pip install dcpsvc[lightning]``.

::

    checkpoints = dcpsvc.integrations.lightning.Checkpoints("s3://bucket/runs/exp42", every=dcpsvc.Every(steps=500))
    Trainer(callbacks=[checkpoints], enable_checkpointing=False).fit(model, loader)

It resumes from the newest commit by itself. The place in the data is exact inside an epoch with torchdata's
StatefulDataLoader, and at the beginning of one with any other. What a validation logs is recorded with the step that it
came after, and with no later one.
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from dcpsvc.checkpointer import Checkpointer
from dcpsvc.state.rng import Rng
from dcpsvc.state.sharing import PerRank

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping


class Checkpoints(Callback):
    """Model, optimizers, schedulers, scaler, loops, other callbacks and generators of a Lightning run.

    Args:
        root: The run root.
        resume: Whether to continue from the newest commit, if there is one.
        state: Further components.
        **options: Of :class:`~dcpsvc.Checkpointer`; ``every`` says when to save.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        resume: bool = True,
        state: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._root, self._resume, self._more, self._options = root, resume, dict(state or {}), options
        self._seen = 0
        self._validated: dict[str, int] = {}
        self._generators: dict[str, Any] | None = None
        self.checkpointer: Checkpointer | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Everything is made and nothing has run: load."""
        self.checkpointer = Checkpointer(self._root, self._state(trainer, pl_module), **self._options)
        if not self._resume:
            return
        self._seen = self.checkpointer.resume()
        if self._seen:
            self._generators = Rng().state_dict()
            if _is_between_epochs(trainer.fit_loop):
                trainer.fit_loop.epoch_progress.reset_on_restart()
                trainer.fit_loop.restarting = False

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The epoch before is complete only now, its schedulers included."""
        del pl_module
        if self._generators is not None and _is_between_epochs(trainer.fit_loop):
            _begin_epoch(trainer.fit_loop)
            Rng().load_state_dict(self._generators)
            self._generators = None
            iter(trainer.fit_loop._data_fetcher)  # noqa: SLF001 - as the loop does for every epoch but the first
        self._step(trainer, self._at_the_end_of_an_epoch(trainer))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Inside an epoch, what making the iterators anew has drawn does not count."""
        del trainer, pl_module, batch, batch_idx
        if self._generators is not None:
            Rng().load_state_dict(self._generators)
            self._generators = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step, unless gradients are still gathered for one, or the epoch ends with it."""
        del pl_module, outputs, batch, batch_idx
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._step(trainer, _logged_now(trainer))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """It came after the step that was told last, or before that of the end of an epoch is told."""
        del pl_module
        if self.checkpointer is None or trainer.sanity_checking:
            return
        step, numbers = int(trainer.global_step), _logged_now(trainer)
        self._validated |= dict.fromkeys(numbers, step)
        if numbers and step == self._seen:
            self.checkpointer.record_metrics(step, numbers)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last step of all."""
        del pl_module
        self._step(trainer, self._at_the_end_of_an_epoch(trainer))

    def _step(self, trainer: Any, numbers: Mapping[str, float]) -> None:
        step = int(trainer.global_step)
        if self.checkpointer is None or step <= self._seen:
            return
        self._seen = step
        if self.checkpointer.step(step, metrics=numbers).should_stop:
            trainer.should_stop = True

    def _at_the_end_of_an_epoch(self, trainer: Any) -> dict[str, float]:
        """All that is known, without what validations of earlier steps have left: Lightning keeps it until the end."""
        step, known = int(trainer.global_step), trainer.callback_metrics.items()
        return {name: float(value) for name, value in known if self._validated.get(name, step) == step}

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The step it came in is not complete."""
        del trainer, pl_module, exception
        self._close(failed=True)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The run is over."""
        del trainer, pl_module, stage
        self._close(failed=False)

    def _close(self, *, failed: bool) -> None:
        if self.checkpointer is not None:
            checkpointer, self.checkpointer = self.checkpointer, None
            checkpointer.close(failed=failed)

    def _state(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"model": pl_module, "loops": PerRank(trainer.fit_loop), "rng": Rng()}
        found |= {f"optim{number}": optimizer for number, optimizer in enumerate(trainer.optimizers)}
        found |= {f"sched{n}": config.scheduler for n, config in enumerate(trainer.lr_scheduler_configs)}
        if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
            found["scaler"] = scaler
        if callbacks := [callback for callback in trainer.callbacks if callback is not self]:
            found["callbacks"] = PerRank(_Callbacks(callbacks))
        return found | self._more


def _logged_now(trainer: Any) -> dict[str, float]:
    """What the loop that runs has logged, the training's or the validation's, and no other one."""
    return {name: float(value) for name, value in trainer._logger_connector.metrics["callback"].items()}  # noqa: SLF001


def _is_between_epochs(loop: Any) -> bool:
    return bool(loop.epoch_progress.current.started == loop.epoch_progress.current.processed)


def _begin_epoch(loop: Any) -> None:
    """No batch is to be made up for, and the loaders, which are at an end, begin anew: from where they ended.

    Left to itself, the loop would pass over the whole next epoch.
    """
    for loader, state in zip(loop._combined_loader.flattened, loop._combined_loader_states_to_load, strict=False):  # noqa: SLF001
        if callable(getattr(loader, "load_state_dict", None)) and state:
            loader.load_state_dict(state)
            for _ in loader:  # nothing is left
                break
    loop._combined_loader_states_to_load = []  # noqa: SLF001


class _Callbacks:
    """What the other callbacks want to keep."""

    def __init__(self, callbacks: list[Any]) -> None:
        self._callbacks = callbacks

    def state_dict(self) -> dict[str, Any]:
        found = {callback.state_key: callback.state_dict() for callback in self._callbacks}
        return {key: state for key, state in found.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for callback in self._callbacks:
            if callback.state_key in state:
                callback.load_state_dict(state[callback.state_key])
