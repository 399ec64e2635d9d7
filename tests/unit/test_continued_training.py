"""Ten steps, a restart and ten more are twenty steps, bit for bit: schedulers, scalers and generators included."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from dcpsvc import Rng
from dcpsvc.errors import ConfigError, RestoreFailedError
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


OWN = {
    "torch": (lambda: torch.Generator().manual_seed(3), lambda g: torch.randn(3, generator=g).tolist()),
    "pcg": (lambda: np.random.default_rng(3), lambda g: [*g.normal(size=3), g.integers(9, dtype=np.int32)]),
    "mt": (lambda: np.random.Generator(np.random.MT19937(3)), lambda g: g.normal(size=3).tolist()),
    "philox": (lambda: np.random.Generator(np.random.Philox(3)), lambda g: g.normal(size=3).tolist()),
    "sfc": (lambda: np.random.Generator(np.random.SFC64(3)), lambda g: g.normal(size=3).tolist()),
    "legacy": (lambda: np.random.RandomState(3), lambda g: [g.normal()]),
    "python": (lambda: random.Random(3), lambda g: [g.gauss(0, 1)]),
}
"""How each kind of generator is made, and a draw that leaves half a number waiting where it can."""


@pytest.mark.parametrize("kind", OWN)
def test_a_generator_of_ones_own_draws_on_where_it_was(tmp_path: Path, kind: str) -> None:
    make, draw = OWN[kind]
    saved, fresh = make(), make()
    draw(saved)
    save(tmp_path, {"rng": Rng(own=saved)})
    resume(tmp_path, {"rng": Rng(own=fresh)})
    assert [draw(fresh) for _ in range(3)] == [draw(saved) for _ in range(3)]


def generators(**own: Any) -> dict[str, Any]:
    return {"rng": Rng(**own)}


@pytest.mark.parametrize(
    ("here", "difference"),
    [
        ({"a": np.random.default_rng()}, r"rng\.own\.a +kind +Random +PCG64"),
        ({"a": random.Random(), "b": random.Random()}, r"rng\.own\.b +missing +- +Random"),
        ({}, r"rng\.own\.a +unexpected +Random +-"),
    ],
)
def test_other_generators_than_the_saved_ones_are_refused_before_anything_is_touched(
    tmp_path: Path, here: dict[str, Any], difference: str
) -> None:
    save(tmp_path, generators(a=random.Random(3)))
    before = torch.get_rng_state()
    torch.rand(1)
    now = torch.get_rng_state()
    with pytest.raises(RestoreFailedError, match=difference):
        resume(tmp_path, generators(**here))
    assert torch.equal(torch.get_rng_state(), now)
    assert not torch.equal(before, now)


def test_a_generator_the_checkpoint_does_not_have_stays_as_it_is_if_that_is_let_pass_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, generators(a=random.Random(3)))
    other = random.Random(4)
    state = other.getstate()
    resume(tmp_path, generators(b=other), strict=False)
    assert other.getstate() == state
    (told,) = [text for text in caplog.messages if "the state and the checkpoint differ" in text]
    assert "not loaded: rng.own.b" in told
    assert "not used: rng.own.a" in told


def test_generators_of_ones_own_are_reseeded_differently_for_each_rank_and_each_of_them() -> None:
    drawn = set()
    for rank in range(2):
        for kind, (make, draw) in OWN.items():
            rng = Rng(**{kind: (one := make()), f"{kind}2": (two := make())})
            rng.reseed(7, rank)
            drawn |= {str(draw(one)), str(draw(two))}
    assert len(drawn) == 4 * len(OWN)


def test_what_is_no_generator_is_refused_when_it_is_declared() -> None:
    with pytest.raises(ConfigError, match=r"Rng\(shuffle=\.\.\.\): a torch.Generator, .* is expected, not int"):
        Rng(shuffle=7)  # type: ignore[arg-type]


def test_generators_of_devices_that_are_not_there_are_told_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    state = Rng().state_dict() | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * 3}
    with caplog.at_level(logging.WARNING, "dcpsvc"):
        Rng().load_state_dict(state)
    assert f"the generators of 3 CUDA devices were saved, and there are {torch.cuda.device_count()} here" in caplog.text
