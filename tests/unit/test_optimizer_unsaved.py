"""What hangs on an optimizer beside its state is not saved: that is said once, and of no optimizer that has nothing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import dcpsvc
from tests.unit.training import OPTIMIZERS, Container, Net, training
from tests.unit.training import step as train_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from torch.optim import Optimizer

    Parameters = Iterable[nn.Parameter]

LOGGER = "dcpsvc.state.optimunsaved"


class Lookahead(torch.optim.AdamW):
    """Keeps its slow weights where no state dict has them."""

    def __init__(self, parameters: Parameters, made: str) -> None:
        super().__init__(parameters)
        given = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        kinds: dict[str, Callable[[], Any]] = {
            "for each": lambda: [given],
            "by name": lambda: {str(number): {"weight": one} for number, one in enumerate(given)},
            "flat": lambda: torch.cat([one.flatten() for one in given]),
        }
        self.slow = kinds[made]()


class Around(torch.optim.Optimizer):
    """Holds another, under a name that nobody knows."""

    def __init__(self, parameters: Parameters) -> None:
        self.base_optimizer = torch.optim.AdamW(parameters)
        super().__init__(self.base_optimizer.param_groups, {})

    def step(self, closure: Any = None) -> None:
        self.base_optimizer.step()


class Holding(torch.optim.Optimizer):
    """Holds another as libraries do, with slow weights of its own."""

    def __init__(self, parameters: Parameters) -> None:
        self.optimizer = torch.optim.AdamW(parameters)
        super().__init__(self.optimizer.param_groups, {})
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()


class Bare(torch.optim.Optimizer):
    """Holds another, and is nothing by itself."""

    def __init__(self, parameters: Parameters) -> None:
        self.optimizers = [torch.optim.AdamW(parameters)]
        self.table = torch.ones(7)

    def step(self, closure: Any = None) -> None:
        self.optimizers[0].step()


class Averaging(torch.optim.SGD):
    """Keeps an average of one parameter, in place or as a new tensor at each step."""

    def __init__(self, parameters: Parameters, *, in_place: bool) -> None:
        super().__init__(parameters, lr=0.1)
        self.average, self._in_place = torch.zeros(7), in_place

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.average = self.average.add_(1) if self._in_place else self.average + 1


class FewBits(torch.optim.AdamW):
    """As those of bitsandbytes: tables that never change once it has begun."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.name2qmap = {"dynamic": torch.linspace(-1, 1, 256), "udynamic": torch.linspace(0, 1, 256)}
        self.counted = torch.zeros(1)
        self.known = [p for group in self.param_groups for p in group["params"]]
        self.views = [p.detach().view(-1) for p in self.known]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        if not self.counted:  # on the device of the parameters from here on
            self.name2qmap = {name: table.clone() for name, table in self.name2qmap.items()}
        self.counted += 1  # a buffer of its kernels
        self.gradients = [p.grad.view(-1) for p in self.known if p.grad is not None]


def told(
    folder: Path, make: Callable[[list[nn.Parameter]], Optimizer], caplog: pytest.LogCaptureFixture, saves: int = 3
) -> list[str]:
    """What is logged of a run that saves at each step, and has another plain value each time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))  # one parameter is a single element
    state: dict[str, Any] = {"model": model, "optim": make(list(model.parameters())), "note": ""}
    caplog.set_level(logging.WARNING, logger=LOGGER)
    with dcpsvc.Checkpointer(folder / "root", state, local=folder / "local", save_last=False) as ckpt:
        for number in range(1, saves + 1):
            model(torch.ones(2, 4)).square().sum().backward()
            state["optim"].step()
            state["note"] = f"step {number}"
            ckpt.save(number).wait(30)
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


@pytest.mark.parametrize("made", ["for each", "by name", "flat"])
def test_slow_weights_are_named_at_the_first_save_and_only_once(
    tmp_path: Path, made: str, caplog: pytest.LogCaptureFixture
) -> None:
    (text,) = told(tmp_path, lambda parameters: Lookahead(parameters, made=made), caplog, saves=1)
    assert text.startswith("optim: Lookahead has tensors in slow, in neither its state nor its param_groups")
    assert told(tmp_path / "again", lambda parameters: Lookahead(parameters, made=made), caplog) == [text, text]


def test_a_container_is_named_for_what_hangs_on_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (text,) = told(tmp_path, Holding, caplog)
    assert text.startswith("optim: Holding has tensors in slow,")


class Exchanging(torch.optim.Optimizer):
    """Holds another from its first step on."""

    def __init__(self, parameters: Parameters) -> None:
        self.optimizer: Optimizer = torch.optim.AdamW(parameters)
        super().__init__(self.optimizer.param_groups, {})

    def step(self, closure: Any = None) -> None:
        if not isinstance(self.optimizer, Lookahead):
            self.optimizer = Lookahead([p for group in self.param_groups for p in group["params"]], made="for each")
        self.optimizer.step()


def test_an_optimizer_that_was_exchanged_in_its_container_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (text,) = told(tmp_path, Exchanging, caplog)
    assert text.startswith("optim: Lookahead has tensors in slow,")


def test_a_container_that_is_no_more_than_that_is_saved_and_not_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not told(tmp_path, Bare, caplog)


def test_an_optimizer_held_under_another_name_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (text,) = told(tmp_path, Around, caplog)
    assert text.startswith("optim: Around has tensors in base_optimizer,")


@pytest.mark.parametrize("in_place", [True, False])
def test_what_changes_from_save_to_save_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, in_place: bool
) -> None:
    assert not told(tmp_path / "one", lambda parameters: Averaging(parameters, in_place=in_place), caplog, saves=1)
    (text,) = told(tmp_path / "two", lambda parameters: Averaging(parameters, in_place=in_place), caplog)
    assert text.startswith("optim: Averaging has tensors in average,")


def test_tables_views_of_parameters_gradients_and_counters_are_not_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert told(tmp_path, FewBits, caplog) == []


OWN = [
    name
    for name in sorted(torch.optim.__all__)
    if isinstance(kind := getattr(torch.optim, name, None), type) and issubclass(kind, torch.optim.Optimizer)
]


def own(name: str, parameters: list[nn.Parameter]) -> Optimizer:
    """One of torch's; Muon takes matrices only."""
    made: Optimizer = getattr(torch.optim, name)([p for p in parameters if p.ndim == 2 or name != "Muon"])
    return closed(made)


def closed(optimizer: Optimizer) -> Optimizer:
    """Stepped without a closure, as the others are; only LBFGS wants one."""
    if isinstance(optimizer, torch.optim.LBFGS):
        step = optimizer.step
        optimizer.step = lambda _=None: step(lambda: torch.tensor(1.0))  # type: ignore[method-assign]
    return optimizer


@pytest.mark.parametrize("name", [name for name in OWN if name not in {"Optimizer", "SparseAdam"}])
def test_no_optimizer_of_torch_is_told_of(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert told(tmp_path, lambda parameters: own(name, parameters), caplog) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_none_of_its_implementations_is_told_of(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert told(tmp_path, OPTIMIZERS[name], caplog) == []


def test_optimizers_in_a_container_under_schedules_are_not_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net()
    for state in (training(), {"model": model, "optim": Container([model.hidden, model.out])}):
        folder = tmp_path / type(state["optim"]).__name__
        with dcpsvc.Checkpointer(folder / "root", state, local=folder / "local", save_last=False) as ckpt:
            for number in (1, 2):
                if "sched" in state:
                    train_step(state)
                ckpt.save(number).wait(30)
    assert [record for record in caplog.records if record.name == LOGGER] == []


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_optimizers_of_few_bits_are_not_told_of(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    ao = pytest.importorskip("torchao.optim")
    assert told(tmp_path, getattr(ao, name), caplog) == []
