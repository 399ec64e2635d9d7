"""Loops of Accelerate that save and resume through dcpsvc: ``pip install dcpsvc[accelerate]``.

::

    from dcpsvc.integrations.accelerate import Checkpoints

    with Checkpoints(accelerator, "s3://bucket/runs/exp42", every=dcpsvc.Every(steps=500)) as run:
        run.resume()
        while run.epoch < epochs and not run.checkpointer.stop_reason:
            for batch in run.batches(loader):
                with accelerator.accumulate(model):
                    ...
                if run.step().should_stop:
                    break

Loaders are prepared with ``DataLoaderConfiguration(use_stateful_dataloader=True, use_seedable_sampler=True)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from dcpsvc.checkpointer import Checkpointer
from dcpsvc.errors import ConfigError
from dcpsvc.pending import StepOutcome
from dcpsvc.state.rng import Rng
from dcpsvc.state.sharing import PerRank

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping
    from types import TracebackType


class Checkpoints:
    """Models, optimizers, schedulers, scaler, loaders, registered objects and generators of an Accelerator.

    Args:
        accelerator: After ``prepare()`` of all that is to be saved.
        root: The run root.
        state: Further components.
        **options: Of :class:`~dcpsvc.Checkpointer`; ``every`` says when to save.

    Attributes:
        checkpointer: For whatever else it can do.
        number: Optimizer steps that are complete.
    """

    def __init__(
        self, accelerator: Any, root: str | os.PathLike[str], *, state: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self._accelerator, self._position = accelerator, _Position(accelerator._dataloaders)  # noqa: SLF001 - as its save_state
        self._generators: dict[str, Any] | None = None
        self.number = 0
        self.checkpointer = Checkpointer(root, self._state() | dict(state or {}), **options)

    @property
    def epoch(self) -> int:
        """How often the loader that was trained from last has been gone through."""
        return self._position.epoch

    def resume(self, step: int | None = None, **terms: Any) -> int:
        """As :meth:`dcpsvc.Checkpointer.resume`; what is drawn until the first batch does not count."""
        self.number = self.checkpointer.resume(step, **terms)
        if self.number:
            self._generators = Rng().state_dict()
        return self.number

    def batches(self, loader: Any) -> Iterator[Any]:
        """One epoch of a prepared loader, or what a resume has left of it.

        Raises:
            ConfigError: The loader cannot tell where it is.
        """
        if not getattr(loader, "use_stateful_dataloader", False):
            prepared = "DataLoaderConfiguration(use_stateful_dataloader=True)"
            raise ConfigError(f"batches(): the loader cannot tell where it is; prepare it with {prepared}")
        if self._position.enter(loader) and self._generators is not None:
            iter(loader.base_dataloader)  # the first of a process draws no seed, the others do
            self._restore()
        for batch in loader:
            self._restore()  # making the iterator anew has drawn numbers
            yield batch
        self._position.leave(loader)

    def step(self, metrics: Mapping[str, float] | None = None) -> StepOutcome:
        """A batch is trained: a step is complete unless gradients are still gathered for one. Every rank.

        Raises:
            SaveError: See :meth:`dcpsvc.Checkpointer.step`.
        """
        if not self._accelerator.sync_gradients:
            return StepOutcome(step=self.number, pending=None, should_stop=False)
        self.number += 1
        return self.checkpointer.step(self.number, metrics=metrics)

    def _restore(self) -> None:
        if self._generators is not None:
            Rng().load_state_dict(self._generators)
            self._generators = None

    def _state(self) -> dict[str, Any]:
        given: Any = self._accelerator
        kinds = {
            "model": given._models,  # noqa: SLF001 - as its own save_state
            "optim": given._optimizers,  # noqa: SLF001
            "sched": given._schedulers,  # noqa: SLF001
            "registered": given._custom_objects,  # noqa: SLF001
        }
        found: dict[str, Any] = {"position": PerRank(self._position), "rng": Rng()}
        for kind, objects in kinds.items():
            found |= {f"{kind}{number or ''}": each for number, each in enumerate(objects)}
        if given.scaler is not None:
            found["scaler"] = given.scaler
        return found

    def __enter__(self) -> Self:
        self.checkpointer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.checkpointer.__exit__(kind, error, trace)


class _Position:
    """Where the loaders are that were trained from, by their place among those that were prepared."""

    def __init__(self, loaders: list[Any]) -> None:
        self._loaders = loaders
        self._inside: dict[int, bool] = {}
        self.epoch = 0

    def enter(self, loader: Any) -> bool:
        """Whether an epoch of it begins, and does not go on."""
        number = self._number(loader)
        goes_on = self._inside.get(number, False)
        self._inside[number] = True
        self.epoch = loader.iteration
        return not goes_on

    def leave(self, loader: Any) -> None:
        """It was gone through."""
        self._inside[self._number(loader)] = False
        self.epoch = loader.iteration

    def _number(self, loader: Any) -> int:
        return next(number for number, each in enumerate(self._loaders) if each is loader)

    def state_dict(self) -> dict[str, Any]:
        """After the last batch of an epoch the next one begins."""
        found: dict[str, Any] = {}
        for number, inside in self._inside.items():
            loader = self._loaders[number]
            ends = inside and loader.end_of_dataloader
            within = loader.state_dict() if inside and not ends else None
            found[str(number)] = {"epoch": loader.iteration + ends, "within": within}
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Each goes on when it is iterated next."""
        for number, one in state.items():
            loader = self._loaders[int(number)]
            loader.iteration = self.epoch = one["epoch"]
            self._inside[int(number)] = one["within"] is not None
            if one["within"] is not None:
                loader.load_state_dict(one["within"])
