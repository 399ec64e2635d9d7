"""Optimizers through a real Checkpointer in one process: state by parameter name, complete where it exists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from dcpsvc import Checkpointer
from dcpsvc.errors import RestoreFailedError, UnsupportedStateError
from tests.unit.one_process import resume, save, told
from tests.unit.training import OPTIMIZERS, Container, Net, everything, seed, train, training

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch.optim import Optimizer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_fresh_optimizer_has_exactly_the_saved_state(tmp_path: Path, optimizer: str) -> None:
    seed(0)
    saved = train(training(optimizer), 5)
    save(tmp_path, saved)
    expected = told(saved["optim"].state_dict())
    fresh = training(optimizer)
    resume(tmp_path, fresh)
    assert told(fresh["optim"].state_dict()) == expected


def test_a_parameter_without_state_has_none_after_loading(tmp_path: Path) -> None:
    save(tmp_path, train(training(), 1))
    other = training()
    for parameter in other["model"].parameters():
        parameter.grad = torch.ones_like(parameter)
    other["optim"].step()
    assert len(other["optim"].state) == len(list(other["model"].parameters()))
    resume(tmp_path, other)
    without = {name for name, parameter in other["model"].named_parameters() if parameter not in other["optim"].state}
    assert without == {"unused.weight", "unused.bias"}


def test_an_optimizer_that_never_stepped_comes_back_without_state(tmp_path: Path) -> None:
    save(tmp_path, training())
    other = train(training(), 2)
    resume(tmp_path, other)
    assert other["optim"].state_dict()["state"] == {}


def test_saving_neither_steps_nor_fills_the_optimizer(tmp_path: Path) -> None:
    state = train(training(), 2)
    before = everything(state)
    save(tmp_path, state)
    assert everything(state) == before


def test_hyper_parameters_come_back(tmp_path: Path) -> None:
    state = training()
    state["optim"].param_groups[0].update(lr=0.125, betas=(0.5, 0.75), weight_decay=3)
    save(tmp_path, state)
    fresh = training()
    resume(tmp_path, fresh)
    (group,) = fresh["optim"].param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.125, (0.5, 0.75), 3)
    assert group["params"] == list(fresh["model"].parameters())


def test_the_order_of_parameters_in_a_group_does_not_matter(tmp_path: Path) -> None:
    seed(0)
    state = train(training("sgd-momentum"), 3)
    save(tmp_path, state)
    model = Net()
    turned = SGD(list(model.parameters())[::-1], lr=1.0, momentum=0.5, nesterov=True)
    resume(tmp_path, {"model": model, "optim": turned})
    for name, parameter in model.named_parameters():
        theirs = state["optim"].state.get(dict(state["model"].named_parameters())[name])
        assert told(turned.state.get(parameter)) == told(theirs)


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        (
            lambda model: [{"params": [p]} for p in model.parameters()],
            "saved with 1 parameter groups, here there are 8",
        ),
        (lambda model: list(model.parameters())[:-1], r"param_groups\.0\.unused\.bias +unexpected"),
    ],
)
def test_other_parameter_groups_are_refused_and_nothing_is_touched(
    tmp_path: Path, groups: Callable[[nn.Module], Any], reason: str
) -> None:
    save(tmp_path, train(training(), 2))
    model = Net()
    optimizer = AdamW(groups(model))
    before = told(model.state_dict())
    with pytest.raises(RestoreFailedError, match=f"optim(.|\\n)*{reason}"):
        resume(tmp_path, {"model": model, "optim": optimizer})
    assert told(model.state_dict()) == before
    assert optimizer.state_dict()["state"] == {}


def test_a_skipped_optimizer_starts_fresh_beside_a_loaded_model(tmp_path: Path) -> None:
    saved = train(training(), 2)
    save(tmp_path, saved)
    fresh = training("sgd-momentum")
    resume(tmp_path, fresh, skip=["optim", "sched"])
    assert told(fresh["model"].state_dict()) == told(saved["model"].state_dict())
    assert fresh["optim"].state_dict()["state"] == {}


def test_an_optimizer_of_parameters_that_no_module_of_the_state_has_comes_back_by_place(tmp_path: Path) -> None:
    def free() -> tuple[list[nn.Parameter], Optimizer]:
        parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
        return parameters, SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1, momentum=0.9)

    parameters, saved = free()
    sum(parameter.square().sum() for parameter in parameters).backward()
    saved.step()
    save(tmp_path, {"optim": saved})
    _, fresh = free()
    resume(tmp_path, {"optim": fresh})
    assert told(fresh.state_dict()) == told(saved.state_dict())


def test_two_optimizers_of_one_model_keep_their_own_state(tmp_path: Path) -> None:
    def two() -> dict[str, Any]:
        model = Net()
        return {
            "model": model,
            "first": AdamW(model.hidden.parameters()),
            "second": SGD(model.out.parameters(), lr=0.1, momentum=0.9),
        }

    saved, fresh = two(), two()
    saved["model"](torch.ones(4, 4)).sum().backward()
    saved["first"].step()
    saved["second"].step()
    save(tmp_path, saved)
    resume(tmp_path, fresh)
    assert everything(fresh) == everything(saved)


class Around(torch.optim.Optimizer):
    """What a library puts around an optimizer, with a state of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()


class Lookahead(Around):
    """Its slow weights follow the fast ones."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter].setdefault("slow", parameter.detach().clone()).lerp_(parameter.detach(), 0.5)


class Joined(Around):
    """Shows the state of the one inside in a dict of its own."""

    state = property(lambda self: dict(self.optimizer.state), lambda self, _: None)


def around(kind: Any) -> dict[str, Any]:
    model = torch.nn.Linear(2, 2)
    return {"model": model, "optim": kind(torch.optim.AdamW(model.parameters()))}


@pytest.mark.parametrize("outer", [lambda one: one, Around])
def test_a_container_with_state_of_its_own_is_refused_by_name_and_nothing_is_published(
    tmp_path: Path, outer: Any
) -> None:
    state = around(lambda optimizer: outer(Lookahead(optimizer)))
    state["model"](torch.ones(4, 2)).sum().backward()
    state["optim"].step()
    with pytest.raises(UnsupportedStateError, match="optim: Lookahead has state of its own"):
        save(tmp_path, state)
    assert not (tmp_path / "root" / "manifests").exists()


@pytest.mark.parametrize("kind", [Around, Joined])
def test_a_container_that_has_no_state_or_shows_that_of_others_is_saved_as_those(tmp_path: Path, kind: Any) -> None:
    saved, fresh = around(kind), around(kind)
    saved["model"](torch.ones(4, 2)).sum().backward()
    saved["optim"].step()
    save(tmp_path, saved)
    resume(tmp_path, fresh)
    assert told(fresh["optim"].optimizer.state_dict()) == told(saved["optim"].optimizer.state_dict())


def test_optimizers_in_a_container_come_back_with_their_state_and_hyper_parameters(tmp_path: Path) -> None:
    def contained() -> dict[str, Any]:
        model = Net()
        return {"model": model, "optim": Container([model.hidden, model.out])}

    saved, fresh = contained(), contained()
    saved["model"](torch.ones(4, 4)).sum().backward()
    saved["optim"].step()
    saved["optim"].optimizers[1].param_groups[0]["lr"] = 0.025
    save(tmp_path, saved)
    resume(tmp_path, fresh)
    assert told(fresh["optim"].state_dict()) == told(saved["optim"].state_dict())
    assert [len(each.state) for each in fresh["optim"].optimizers] == [2, 2]


def test_an_optimizer_that_was_exchanged_in_its_container_is_the_one_that_is_saved_and_loaded(tmp_path: Path) -> None:
    def exchanged(ckpt: Checkpointer, state: dict[str, Any]) -> Checkpointer:
        state["optim"].optimizers[1] = SGD(state["model"].out.parameters(), lr=0.5, momentum=0.9)
        return ckpt

    def contained() -> dict[str, Any]:
        model = Net()
        return {"model": model, "optim": Container([model.hidden, model.out])}

    saved, fresh = contained(), contained()
    options: dict[str, Any] = {"local": tmp_path / "local", "save_last": False}
    with exchanged(Checkpointer(tmp_path / "root", saved, **options), saved) as ckpt:
        saved["model"](torch.ones(4, 4)).sum().backward()
        saved["optim"].step()
        ckpt.save(1).wait(30)
    with exchanged(Checkpointer(tmp_path / "root", fresh, **options), fresh) as ckpt:
        ckpt.resume()
    assert told(fresh["optim"].state_dict()) == told(saved["optim"].state_dict())
    assert [list(entries) for entries in fresh["optim"].optimizers[1].state.values()] == [["momentum_buffer"]] * 2
