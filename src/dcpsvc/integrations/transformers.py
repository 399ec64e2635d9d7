"""A Hugging Face Trainer that saves and resumes through dcpsvc: ``pip install dcpsvc[transformers]``.

::

    class Trainer(dcpsvc.integrations.transformers.Checkpointed, transformers.Trainer):
        checkpoint_root = "s3://bucket/runs/exp42"

    Trainer(...).train(resume_from_checkpoint=True)  # starts fresh where nothing is committed yet

``save_strategy``, ``save_steps`` and ``save_total_limit`` say when to save and what to keep, as ever; a preemption and
``dcpsvc save|stop`` save beside them. Every rank writes its own part, in the background.
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from dcpsvc.checkpointer import Checkpointer
from dcpsvc.errors import RootError
from dcpsvc.loading import load
from dcpsvc.policies import Latest
from dcpsvc.reading import list_checkpoints
from dcpsvc.state.rng import Rng
from dcpsvc.state.sharing import OneRank, PerRank

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from dcpsvc.pending import StepOutcome

_PROGRESS = "trainer_state.json"
_OF_A_PROCESS = ("is_local_process_zero", "is_world_process_zero")


class Checkpointed:
    """Put before ``transformers.Trainer``, or a class made of it, among the bases.

    Attributes:
        checkpoint_root: The run root.
        checkpoint_options: Further options of :class:`~dcpsvc.Checkpointer`.
        checkpoint_state: Further components of the state.
    """

    checkpoint_root: str | os.PathLike[str] = ""
    checkpoint_options: Mapping[str, Any] = {}
    checkpoint_state: Mapping[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._checkpointer: Checkpointer | None = None
        self._outcome: StepOutcome | None = None
        self._generators: dict[str, Any] = {}
        self._folder = ""
        self._trainer.add_callback(_AfterEachStep(self))

    @property
    def _trainer(self) -> Any:
        """This object as what it is mixed into."""
        return self

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:  # noqa: FBT001 - theirs
        """As ever; ``resume_from_checkpoint=True`` takes the newest commit of the run root, if there is one."""
        with tempfile.TemporaryDirectory(prefix="dcpsvc-resume-") as folder:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = self._folder = folder if self._write_progress(Path(folder)) else ""
            failed = True
            try:
                result = super().train(resume_from_checkpoint or None, **kwargs)  # type: ignore[misc]
                failed = False
            finally:
                if self._checkpointer is not None:
                    checkpointer, self._checkpointer = self._checkpointer, None
                    checkpointer.close(failed=failed)
            return result

    def after_step(self) -> StepOutcome:
        """Tell that a step is complete. Every rank."""
        self._outcome = self._open().step(self._trainer.state.global_step)
        return self._outcome

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        self._open()  # what is wrong with the root is said before the first step
        return found

    def _open(self) -> Checkpointer:
        if self._checkpointer is None:
            limit = self._trainer.args.save_total_limit
            options: dict[str, Any] = {"keep": Latest(limit)} if limit else {}
            self._checkpointer = Checkpointer(
                self.checkpoint_root, self._state(), **(options | {**self.checkpoint_options})
            )
        return self._checkpointer

    def _state(self) -> dict[str, Any]:
        trainer = self._trainer
        found: dict[str, Any] = {
            "model": trainer.model,
            "optim": getattr(trainer.optimizer, "optimizer", trainer.optimizer),
            "sched": trainer.lr_scheduler,
            "trainer": OneRank(_Progress(self), 0),
            "rng": Rng(),
        }
        if (scaler := getattr(trainer.accelerator, "scaler", None)) is not None:
            found["scaler"] = scaler
        return found | dict(self.checkpoint_state)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        del model, trial
        trainer = self._trainer
        step = trainer.state.global_step
        if self._outcome is not None and self._outcome.step == step and self._outcome.pending is not None:
            return  # a stop, or somebody's command, had this very step saved
        last = trainer.state.log_history[-1] if trainer.state.log_history else {}
        self._open().save(step, metrics={k: v for k, v in last.items() if isinstance(v, int | float)})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if resume_from_checkpoint != self._folder:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not checkpoint or checkpoint != self._folder:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        self._open().resume(self._trainer.state.global_step)
        self._generators = Rng().state_dict()

    def _load_scaler(self, checkpoint: str | None) -> None:
        if not checkpoint or checkpoint != self._folder:
            super()._load_scaler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Again: fast-forwarding the data has drawn numbers since."""
        if not checkpoint or checkpoint != self._folder:
            super()._load_rng_state(checkpoint)  # type: ignore[misc]
        else:
            Rng().load_state_dict(self._generators)

    def _write_progress(self, folder: Path) -> bool:
        """What the Trainer reads before there is a model: how far the run was. False if nothing is committed."""
        options = self.checkpoint_options.get("storage_options")
        try:
            if not any(
                found.state == "committed" for found in list_checkpoints(self.checkpoint_root, storage_options=options)
            ):
                return False
        except RootError:  # no run yet
            return False
        progress: dict[str, Any] = {}
        load(self.checkpoint_root, {"trainer": PerRank(progress)}, storage_options=options)
        (folder / _PROGRESS).write_text(json.dumps(progress))
        return True


class _Progress:
    """The Trainer's counters, history and callbacks."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def state_dict(self) -> dict[str, Any]:
        trainer = self._owner
        for callback in (*trainer.callback_handler.callbacks, trainer.control):
            if isinstance(callback, ExportableState):
                trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(trainer.state)))
        return {name: value for name, value in found.items() if name not in _OF_A_PROCESS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: the Trainer has read it from its own file."""


class _AfterEachStep(TrainerCallback):
    """So that a stop is agreed on, and its step saved."""

    def __init__(self, owner: Checkpointed) -> None:
        self._owner = owner

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, kwargs
        if self._owner.after_step().should_stop:
            control.should_training_stop = True
