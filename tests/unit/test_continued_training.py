"""Ten steps, a restart and ten more are twenty steps, bit for bit: schedulers, scalers and generators included."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from dcpsvc import Rng
from tests.unit.one_process import resume, save
from tests.unit.training import OPTIMIZERS, SCHEDULERS, everything, resumed, seed, train, training

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [(name, "step") for name in OPTIMIZERS]
    + [("adamw", name) for name in SCHEDULERS]
    + [("sgd-momentum", "sequential")],
)
def test_ten_steps_a_restart_and_ten_more_are_twenty_steps_bit_for_bit(
    tmp_path: Path, optimizer: str, scheduler: str
) -> None:
    seed(0)
    straight = everything(train(training(optimizer, scheduler), 20))
    assert everything(train(resumed(tmp_path, optimizer, scheduler), 10)) == straight


def test_the_scheduler_still_drives_the_loaded_optimizer(tmp_path: Path) -> None:
    fresh = resumed(tmp_path, "sgd", "step")
    before = fresh["optim"].param_groups[0]["lr"]
    train(fresh, 3)
    assert fresh["optim"].param_groups[0]["lr"] == before * 0.5


def test_a_grad_scaler_comes_back(tmp_path: Path) -> None:
    saved = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)
    saved.scale(torch.ones(1))
    save(tmp_path, {"scaler": saved})
    fresh = torch.amp.GradScaler("cpu")
    resume(tmp_path, {"scaler": fresh})
    assert fresh.state_dict() == saved.state_dict()


def test_the_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.rand()), np.random.normal(), torch.rand(1).item()]  # noqa: NPY002

    seed(5)
    draw()  # leaves half a pair of normal numbers waiting in Python and in NumPy
    save(tmp_path, {"rng": Rng()})
    expected = [draw(), draw()]
    seed(6)
    resume(tmp_path, {"rng": Rng()})
    assert [draw(), draw()] == expected
