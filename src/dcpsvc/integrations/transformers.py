"""A Hugging Face Trainer that saves and resumes through dcpsvc: ``pip install dcpsvc[transformers]``.

::

    class Trainer(dcpsvc.integrations.transformers.Checkpointed, transformers.Trainer):
        checkpoint_root = "s3://bucket/runs/exp42"

    Trainer(...).train(resume_from_checkpoint=True)  # starts fresh where nothing is committed yet

``save_strategy``, ``save_steps`` and ``save_total_limit`` say when to save and what to keep, as ever; a preemption and
``dcpsvc save|stop`` save beside them. Every rank writes its own part, in the background. With
``metric_for_best_model`` the best checkpoint stays beside the newest ones, and ``load_best_model_at_end`` loads it.
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
import dataclasses
import json
import logging
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from dcpsvc.checkpointer import Checkpointer
from dcpsvc.errors import RootError, StepExistsError
from dcpsvc.loading import load
from dcpsvc.policies import Best, Latest
from dcpsvc.reading import list_checkpoints
from dcpsvc.state.rng import Rng
from dcpsvc.state.sharing import OneRank, PerRank

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from dcpsvc.pending import StepOutcome

logger = logging.getLogger(__name__)

_PROGRESS = "trainer_state.json"
_LOADING = ("only", "storage_options", "sync_timeout_s")
"""Options that are those of :func:`dcpsvc.load` too."""
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
        self._folder, self._went_back = "", False
        self._trainer.add_callback(_AfterEachStep(self))

    @property
    def _trainer(self) -> Any:
        """This object as what it is mixed into."""
        return self

    def train(self, resume_from_checkpoint: str | int | bool | None = None, **kwargs: Any) -> Any:  # noqa: FBT001
        """As ever, and from our checkpoints.

        Args:
            resume_from_checkpoint: True, or the run root, takes the newest commit, if there is one; a step, or
                ``<root>/checkpoint-<step>``, takes that one; any other path is a folder of the Trainer's own.
            **kwargs: For the Trainer.

        Raises:
            NoSuchStepError: The step is not committed.
        """
        with tempfile.TemporaryDirectory(prefix="dcpsvc-resume-") as folder:
            if (step := self._step_of(resume_from_checkpoint)) is not None:
                resume_from_checkpoint = self._folder = folder if self._write_progress(Path(folder), step) else ""
            self._went_back = bool(step)
            failed = True
            try:
                result = super().train(resume_from_checkpoint or None, **kwargs)  # type: ignore[misc]
                failed = False
            finally:
                self._close(failed=failed)
            return result

    def after_step(self) -> StepOutcome:
        """Tell that a step is complete. Every rank."""
        self._outcome = self._open().step(self._trainer.state.global_step)
        return self._outcome

    def after_evaluation(self) -> None:
        """Its step may be saved already, by a command, or may be the last, which the end saves."""
        state = self._trainer.state
        if self._checkpointer is None or self._outcome is None or self._outcome.step != state.global_step:
            return
        if numbers := _numbers(state.log_history, state.global_step):
            self._checkpointer.record_metrics(state.global_step, numbers)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        self._open()  # what is wrong with the root is said before the first step
        return found

    def _open(self) -> Checkpointer:
        if self._checkpointer is None:
            self._checkpointer = Checkpointer(
                self.checkpoint_root, self._state(), **(self._keep() | {**self.checkpoint_options})
            )
        return self._checkpointer

    def _close(self, *, failed: bool) -> None:
        if self._checkpointer is not None:
            checkpointer, self._checkpointer = self._checkpointer, None
            checkpointer.close(failed=failed)

    def _keep(self) -> dict[str, Any]:
        args = self._trainer.args
        if not args.save_total_limit:
            return {}
        newest = Latest(args.save_total_limit)
        if not (metric := _metric(args)):
            return {"keep": newest}
        return {"keep": newest | Best(1, metric, "max" if args.greater_is_better else "min")}

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
        state, checkpointer = self._trainer.state, self._open()
        step = state.global_step
        metrics = _numbers(state.log_history, step)
        if step == state.best_global_step:
            state.best_model_checkpoint = self._name_of(step)
        if self._outcome is not None and self._outcome.step == step and self._outcome.pending is not None:
            checkpointer.record_metrics(step, metrics)  # a stop, or somebody's command, had this very step saved
        else:
            try:
                checkpointer.save(step, metrics=metrics)
            except StepExistsError:
                if not self._went_back:  # else the resume has said that newer commits stay
                    raise

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer looks for the best among folders, and with a limit of 1 deletes all others: so it sees none."""
        trainer, given = self._trainer, self._trainer.args
        if given.load_best_model_at_end:
            self._close(failed=False)  # what is saved from here on would be the best model under the last step
        best = self._best_step()
        if best is None and given.load_best_model_at_end:
            logger.warning("no checkpoint has %s: the last model stays, not the best", _metric(given))
        name = None if best is None else self._name_of(best)
        trainer.state.best_model_checkpoint = name if given.load_best_model_at_end else None
        result = super()._finalize_training(*args, **kwargs)  # type: ignore[misc]
        trainer.state.best_model_checkpoint = name
        return result

    def _load_best_model(self) -> None:
        trainer = self._trainer
        step = self._step_of(trainer.state.best_model_checkpoint)
        options = {name: self.checkpoint_options[name] for name in _LOADING if name in self.checkpoint_options}
        logger.info("loading the best model, step %s (%s)", step, trainer.state.best_metric)
        load(self.checkpoint_root, {"model": trainer.model}, step, **options)
        trainer.state.best_model_checkpoint = None

    def _best_step(self) -> int | None:
        """Of the committed ones, as :class:`~dcpsvc.Best` counts."""
        args = self._trainer.args
        if not (metric := _metric(args)):
            return None
        if self._checkpointer is not None:
            self._checkpointer.wait()
        sign = -1.0 if args.greater_is_better else 1.0
        listed = list_checkpoints(self.checkpoint_root, storage_options=self.checkpoint_options.get("storage_options"))
        found = [(sign * c.metrics.get(metric, math.nan), c.step) for c in listed if c.state == "committed"]
        return min(((value, step) for value, step in found if math.isfinite(value)), default=(0.0, None))[1]

    def _name_of(self, step: int) -> str:
        return f"{str(self.checkpoint_root).rstrip('/')}/checkpoint-{step}"

    def _step_of(self, resume_from: Any) -> int | None:
        """Which step of ours that names; 0 for the newest, None if it is none of ours."""
        root = str(self.checkpoint_root).rstrip("/")
        if resume_from is True or str(resume_from).rstrip("/") == root:
            return 0
        if isinstance(resume_from, int) and resume_from:
            return resume_from
        name = str(resume_from).removeprefix(f"{root}/checkpoint-")
        return int(name) if name != str(resume_from) and name.isdecimal() else None

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

    def _write_progress(self, folder: Path, step: int) -> bool:
        """What the Trainer reads before there is a model: how far the run was. False if nothing is committed."""
        options = self.checkpoint_options.get("storage_options")
        try:
            listed = list_checkpoints(self.checkpoint_root, storage_options=options)
        except RootError:  # no run yet
            if step:
                raise
            return False
        if not step and not any(found.state == "committed" for found in listed):
            return False
        progress: dict[str, Any] = {}
        load(self.checkpoint_root, {"trainer": PerRank(progress)}, step or None, storage_options=options)
        progress["best_model_checkpoint"] = None  # it would be looked for among folders
        (folder / _PROGRESS).write_text(json.dumps(progress))
        return True


def _metric(args: Any) -> str:
    """Under which name the best is told; empty if it is not."""
    name = args.metric_for_best_model or ""
    return name if not name or name.startswith("eval_") else f"eval_{name}"


def _numbers(history: list[dict[str, Any]], step: int) -> dict[str, float]:
    """What was logged of a step, by its training and by its evaluation."""
    found = {name: value for entry in history if entry.get("step") == step for name, value in entry.items()}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


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
    """So that a stop is agreed on and its step saved, and an evaluation is recorded with it."""

    def __init__(self, owner: Checkpointed) -> None:
        self._owner = owner

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, kwargs
        if self._owner.after_step().should_stop:
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, control, kwargs
        self._owner.after_evaluation()
