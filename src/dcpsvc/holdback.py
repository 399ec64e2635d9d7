"""Holdback: an optimizer does not step before what it is going to change is copied."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from dcpsvc.copying import Copying


class Holdback:
    """Watches the optimizers of the state while something of theirs is being copied. Training thread only.

    Attributes:
        waited_s: Of all steps together.
    """

    def __init__(self) -> None:
        self._optimizers: Sequence[Optimizer] = ()
        self._hooks: list[RemovableHandle] = []
        self._copyings: list[tuple[Copying, Callable[[float], None]]] = []
        self._pid = os.getpid()
        self.waited_s = 0.0

    def watch(self, optimizers: Sequence[Optimizer], copying: Copying, waited: Callable[[float], None]) -> None:
        """From now on no step before ``copying`` has let it; ``waited`` hears how many seconds each step lost."""
        self._copyings = [(each, tell) for each, tell in self._copyings if not each.ended]
        if [id(each) for each in optimizers] != [id(each) for each in self._optimizers]:
            self.wait()  # nobody watches the old ones from here on
            self._unhook()
            self._optimizers = optimizers
            on_step: Any = torch.compiler.disable(self._on_step)  # a step that is compiled waits like any other
            self._hooks = [each.register_step_pre_hook(on_step) for each in optimizers]
        self._copyings.append((copying, waited))

    def wait(self) -> None:
        """Until everything is copied: the state is about to be changed."""
        for copying, _ in self._copyings:
            copying.release_all()

    def close(self) -> None:
        """Leave the optimizers alone; what is being copied is copied first."""
        self.wait()
        self._unhook()
        self._optimizers = ()

    def _on_step(self, optimizer: Optimizer, *_: object) -> None:
        if os.getpid() != self._pid:
            return  # in a forked child nobody copies, and its state is its own
        for copying, waited in self._copyings:
            if copying.ended:
                continue
            began = time.perf_counter()
            copying.release(id(optimizer))
            seconds = time.perf_counter() - began
            self.waited_s += seconds
            waited(seconds)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
