"""A small training run that draws from every generator, with every optimizer and scheduler one may meet."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from dcpsvc import Rng
from tests.unit.one_process import resume, save, told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from torch.optim.lr_scheduler import LRScheduler

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "adamw": lambda parameters: AdamW(parameters, lr=0.01),
    "adamw-foreach": lambda parameters: AdamW(parameters, lr=0.01, foreach=True),
    "adamw-fused": lambda parameters: AdamW(parameters, lr=0.01, fused=True),
    "adam-amsgrad": lambda parameters: Adam(parameters, lr=0.01, amsgrad=True, foreach=False),
    "adam-tensor-lr": lambda parameters: Adam(parameters, lr=torch.tensor(0.01)),
    "sgd": lambda parameters: SGD(parameters, lr=0.01),
    "sgd-momentum": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9, nesterov=True),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=0.01, centered=True),
    "adagrad": lambda parameters: Adagrad(parameters, lr=0.01),
}

SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "step": lambda optimizer: StepLR(optimizer, 3, 0.5),
    "multi-step": lambda optimizer: MultiStepLR(optimizer, [2, 2, 5], 0.5),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 20),
    "one-cycle": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=40),
    "sequential": lambda optimizer: SequentialLR(optimizer, [LinearLR(optimizer), StepLR(optimizer, 4)], [5]),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=1),
}


class Net(nn.Module):
    """Has a parameter that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(8, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(self.norm(self.hidden(batch)).relu()))


class Container(Optimizer):
    """An optimizer for each part of a model, stepped as one: what it is given is all the state it has of its own."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        self.optimizers = [AdamW(part.parameters(), lr=0.1) for part in parts]
        super().__init__([p for each in self.optimizers for p in each.param_groups[0]["params"]], {"lr": 0.1})

    def step(self) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(number): optimizer.state_dict() for number, optimizer in enumerate(self.optimizers)}


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 - the generator that user code draws from
    random.seed(number)


def training(optimizer: str = "adamw", scheduler: str = "step") -> dict[str, Any]:
    model = Net()
    optim = OPTIMIZERS[optimizer](model.parameters())
    return {"model": model, "optim": optim, "sched": SCHEDULERS[scheduler](optim), "rng": Rng()}


def step(state: dict[str, Any]) -> None:
    """One step that draws from every generator: NumPy the batch, Python the noise, torch the dropout."""
    batch = torch.from_numpy(np.random.rand(6, 4).astype("f4")) + random.random()  # noqa: NPY002
    loss = state["model"](batch).square().mean()
    state["optim"].zero_grad()
    loss.backward()
    state["optim"].step()
    state["sched"].step(*([loss.item()] if isinstance(state["sched"], ReduceLROnPlateau) else []))


def train(state: dict[str, Any], steps: int) -> dict[str, Any]:
    for _ in range(steps):
        step(state)
    return state


def everything(state: dict[str, Any]) -> dict[str, Any]:
    return {name: told(value.state_dict()) for name, value in state.items()}


def resumed(folder: Path, optimizer: str, scheduler: str) -> dict[str, Any]:
    """Ten steps saved, then loaded into objects that have a past of their own."""
    seed(0)
    save(folder, train(training(optimizer, scheduler), 10), step=10)
    seed(99)
    other = train(training(optimizer, scheduler), 3)
    assert resume(folder, other) == 10
    return other
