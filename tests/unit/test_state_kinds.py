"""R27 R31 R32: kinds of state that libraries bring along: saved, and loaded into fresh objects that go on alike."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from dcpsvc import Checkpointer, PerRank, Replicated
from dcpsvc.errors import SharingError, UnsupportedStateError
from tests.unit.one_process import resume, save, told
from tests.unit.training import Net, everything, seed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# --- averages ---------------------------------------------------------------------------------------


def averaging(*, use_buffers: bool) -> dict[str, Any]:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    return {"model": model, "optim": optimizer, "ema": average, "swa": SWALR(optimizer, swa_lr=0.05)}


def average_steps(state: dict[str, Any], steps: int) -> dict[str, Any]:
    for _ in range(steps):
        state["optim"].zero_grad()
        state["model"](torch.randn(6, 4)).square().mean().backward()
        state["optim"].step()
        state["swa"].step()
        state["ema"].update_parameters(state["model"])
    return state


@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_average_of_the_model_goes_on_after_a_resume_bit_for_bit(tmp_path: Path, *, use_buffers: bool) -> None:
    seed(0)
    state = average_steps(averaging(use_buffers=use_buffers), 10)
    save(tmp_path, state, step=10)
    fresh = average_steps(averaging(use_buffers=use_buffers), 2)
    resume(tmp_path, fresh)
    ends = []
    for one in (state, fresh):
        seed(1)
        ends.append(everything(average_steps(one, 10)))
    assert ends[0] == ends[1]


# --- optimizer state that is not there, not yet, or no longer ----------------------------------------


def branches() -> nn.ModuleDict:
    return nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 3)})


def use(state: dict[str, Any], *names: str) -> None:
    state["optim"].zero_grad(set_to_none=True)
    x = torch.ones(2, 3)
    for name in names:
        x = state["model"][name](x)
    x.square().sum().backward()
    state["optim"].step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9),
    "sgd-foreach": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9, foreach=True),
    "sgd-fused": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9, fused=True),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01),
    "adamw-foreach": lambda parameters: AdamW(parameters, lr=0.01, foreach=True),
    "adamw-fused": lambda parameters: AdamW(parameters, lr=0.01, fused=True),
}


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS.keys() - {"sgd-fused"}))  # torch's cannot begin one later
def test_a_parameter_that_gets_its_first_gradient_after_the_resume_begins_as_it_would_have(
    tmp_path: Path, kind: str
) -> None:
    seed(0)
    model = branches()
    state = {"model": model, "optim": OPTIMIZERS[kind](model.parameters())}
    for _ in range(10):
        use(state, "first")
    save(tmp_path, state)
    other = branches()
    fresh = {"model": other, "optim": OPTIMIZERS[kind](other.parameters())}
    use(fresh, "first", "second")  # has state for both: that of the second must go
    resume(tmp_path, fresh)
    for one in (state, fresh):
        for _ in range(10):
            use(one, "first", "second")
    assert everything(fresh) == everything(state)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_parameter_frozen_during_training_keeps_its_state_over_a_resume(tmp_path: Path, kind: str) -> None:
    seed(0)
    model = branches()
    state = {"model": model, "optim": OPTIMIZERS[kind](model.parameters())}
    for _ in range(3):
        use(state, "first", "second")
    model["first"].requires_grad_(requires_grad=False)
    for _ in range(3):
        use(state, "first", "second")
    save(tmp_path, state)
    other = branches()
    other["first"].requires_grad_(requires_grad=False)
    fresh = {"model": other, "optim": OPTIMIZERS[kind](other.parameters())}
    resume(tmp_path, fresh)
    for one in (state, fresh):
        one["model"]["first"].requires_grad_(requires_grad=True)  # thawed: its momentum counts again
        for _ in range(4):
            use(one, "first", "second")
    assert everything(fresh) == everything(state)


class LowRank(nn.Module):
    """A frozen base with two small factors beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(requires_grad=False)
        self.down, self.up = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.zeros(2, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down @ self.up


@pytest.mark.parametrize("given", ["all", "trainable"])
def test_an_optimizer_over_a_frozen_base_and_its_factors_goes_on_bit_for_bit(tmp_path: Path, given: str) -> None:
    def training() -> dict[str, Any]:
        model = LowRank()
        return {"model": model, "optim": AdamW([p for p in model.parameters() if given == "all" or p.requires_grad])}

    def steps(state: dict[str, Any]) -> dict[str, Any]:
        for _ in range(10):
            state["optim"].zero_grad()
            state["model"](torch.randn(4, 8)).square().sum().backward()
            state["optim"].step()
        return state

    seed(0)
    state = steps(training())
    save(tmp_path, state)
    fresh = steps(training())
    resume(tmp_path, fresh)
    ends = []
    for one in (state, fresh):
        seed(1)
        ends.append(everything(steps(one)))
    assert ends[0] == ends[1]


# --- mixed precision --------------------------------------------------------------------------------


def test_a_grad_scaler_that_skipped_steps_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def training() -> dict[str, Any]:
        model = nn.Linear(4, 4)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
        return {"model": model, "optim": Adam(model.parameters(), lr=0.01), "scaler": scaler}

    def steps(state: dict[str, Any]) -> dict[str, Any]:
        for number in range(10):
            x = torch.randn(2, 4) * (torch.inf if number == 4 else 1.0)
            state["optim"].zero_grad()
            state["scaler"].scale(state["model"](x).square().mean()).backward()
            state["scaler"].step(state["optim"])
            state["scaler"].update()
        return state

    seed(0)
    state = steps(training())
    save(tmp_path, state)
    fresh = training()
    resume(tmp_path, fresh)
    ends = []
    for one in (state, fresh):
        seed(1)
        ends.append(everything(steps(one)))
    assert ends[0] == ends[1]
    assert state["scaler"].get_scale() != 2.0**8


# --- metrics ----------------------------------------------------------------------------------------


def metrics(*, persistent: bool = True) -> nn.Module:
    torchmetrics = pytest.importorskip("torchmetrics")
    found = torchmetrics.MetricCollection(
        {"mean": torchmetrics.MeanMetric(), "cat": torchmetrics.CatMetric(), "max": torchmetrics.MaxMetric()}
    )
    found.persistent(persistent)
    return found


@pytest.mark.parametrize("wrap", [PerRank, Replicated, lambda metric: metric])
def test_a_metric_goes_on_counting_where_it_was(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    saved, fresh = metrics(), metrics()
    for value in (1.0, 5.0, 3.0):
        saved.update(torch.tensor([value]))
    fresh.update(torch.tensor([100.0]))
    save(tmp_path, {"seen": wrap(saved)})
    resume(tmp_path, {"seen": wrap(fresh)})
    for one in (saved, fresh):
        one.update(torch.tensor([2.0]))
    assert told(fresh.compute()) == told(saved.compute())


def test_a_metric_whose_state_dict_is_empty_is_refused_and_told_how_to_keep_it(tmp_path: Path) -> None:
    state = {"seen": metrics(persistent=False)}
    with Checkpointer(tmp_path / "root", state, local=tmp_path / "local", save_last=False) as ckpt:
        with pytest.raises(UnsupportedStateError, match=r"seen: .*persistent\(True\)"):
            ckpt.save(1)
        state["seen"].persistent(mode=True)
        ckpt.save(2).wait(30)


# --- position in the data ---------------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 41

    def __getitem__(self, index: int) -> int:
        return index


class Stream(torch.utils.data.IterableDataset):
    """Each worker reads its own numbers, and knows how far it is."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        worker = torch.utils.data.get_worker_info()
        of, mine = (worker.num_workers, worker.id) if worker else (1, 0)
        while self.at < 41:
            self.at += 1
            if (self.at - 1) % of == mine:
                yield self.at - 1

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.timeout(180)  # eight workers import torch anew
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning", "ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", [Numbers, Stream])
def test_three_resumes_inside_an_epoch_give_every_sample_exactly_once(
    tmp_path: Path, data: type[Any], workers: int
) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        options: dict[str, Any] = {"num_workers": workers, "shuffle": data is Numbers}
        if workers:
            options |= {"prefetch_factor": 3, "multiprocessing_context": "forkserver"}
        return stateful.StatefulDataLoader(data(), batch_size=2, **options)

    seen: list[int] = []
    for life in range(4):
        torch.manual_seed(life)  # the order is the checkpoint's, not the seed's
        mine = loader()
        with Checkpointer(
            tmp_path / "root", {"loader": PerRank(mine)}, local=tmp_path / "local", save_last=False
        ) as ckpt:
            step = ckpt.resume()
            for batch in mine:
                step += 1
                seen += batch.tolist()
                if life < 3 and step % 4 == 0:  # workers have fetched more than was given out
                    ckpt.save(step).wait(30)
                    break
    assert sorted(seen) == list(range(41))
    assert len(seen) == 41


# --- what belongs to whom ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (lambda net: {"model": net, "again": net}, "again: the same Net as model"),
        (lambda net: {"model": net, "again": torch.compile(net, backend="eager")}, "again: the same Net as model"),
        (lambda net: {"model": net, "head": net.out}, r"head: it is model\.out already"),
        (lambda net: {"head": net.out, "model": net}, r"head: it is model\.out already"),
        (lambda net: {"one": (optim := SGD(net.parameters())), "two": optim}, "two: the same SGD as one"),
    ],
)
def test_an_object_that_two_components_claim_is_refused_by_both_names(
    tmp_path: Path, state: Callable[[Net], dict[str, Any]], named: str
) -> None:
    with pytest.raises(SharingError, match=named):
        Checkpointer(tmp_path / "root", state(Net()), local=tmp_path / "local")
    assert not (tmp_path / "root").exists()


def test_two_modules_that_share_a_part_are_both_saved_and_share_it_afterwards(tmp_path: Path) -> None:
    def pair() -> dict[str, Any]:
        shared = nn.Linear(3, 3)
        return {"one": nn.Sequential(shared, nn.Linear(3, 1)), "two": nn.Sequential(shared, nn.Linear(3, 2))}

    state, fresh = pair(), pair()
    save(tmp_path, state)
    resume(tmp_path, fresh)
    assert everything(fresh) == everything(state)
    assert fresh["one"][0] is fresh["two"][0]


def test_a_copy_of_the_model_is_an_object_of_its_own(tmp_path: Path) -> None:
    net = Net()
    save(tmp_path, {"model": net, "teacher": copy.deepcopy(net)})
