"""What a load is asked for is what it reads and fills: part of the state, part of a model, a model without memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import torch
from torch import nn

import dcpsvc
from dcpsvc.errors import RestoreFailedError
from dcpsvc.format import keys
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.storage.posix import PosixStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

T = TypeVar("T")
WIDTH = 1500


class Counting(PosixStore):
    """A run root from which each byte is fetched once; counts those of shards."""

    cached = False

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.given_out = 0

    def read(self, key: str, begin: int, end: int) -> bytes:
        self.given_out += (end - begin) * key.startswith(keys.DATA)
        return super().read(key, begin, end)

    def stream_into(
        self,
        key: str,
        begin: int,
        views: Sequence[memoryview],
        look: Callable[[Iterator[memoryview]], T],
        *,
        once: bool = False,
    ) -> T:
        self.given_out += sum(map(len, views)) * key.startswith(keys.DATA)
        return super().stream_into(key, begin, views, look, once=once)


class Model(nn.Module):
    """An encoder of 18 MiB, a head of 9 MiB that shares its weight, a frozen part, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.head.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(requires_grad=False)
        self.register_buffer("counts", torch.arange(5))


@pytest.fixture
def trained() -> dict[str, Any]:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return {"model": model, "optim": optimizer, "sched": torch.optim.lr_scheduler.StepLR(optimizer, 3)}


@pytest.fixture
def store(trained: dict[str, Any], tmp_path: Path) -> Counting:
    with dcpsvc.Checkpointer(tmp_path / "root", trained, local=tmp_path / "local", save_last=False) as ckpt:
        ckpt.save(1).wait(60)
    return Counting(tmp_path / "root")


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def nbytes(*modules: nn.Module) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


SLACK = 6 * BLOCK_NBYTES
"""Blocks at the edges, and the JSON documents."""


def test_a_model_alone_is_loaded_without_a_byte_of_its_optimizer(store: Counting, trained: dict[str, Any]) -> None:
    model = Model()
    dcpsvc.load(store, {"model": model})
    assert same(model, trained["model"])
    assert store.given_out <= nbytes(model) + SLACK


def test_a_state_without_an_optimizer_leaves_it_out(store: Counting, trained: dict[str, Any]) -> None:
    model = Model()
    other = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=1.0), 5)
    dcpsvc.load(store, {"model": model, "sched": other})
    assert same(model, trained["model"])
    assert other.step_size == 3
    assert store.given_out <= nbytes(model) + SLACK


def test_of_a_model_that_skips_a_beginning_only_the_rest_is_read(store: Counting, trained: dict[str, Any]) -> None:
    model = Model()
    kept = model.head.weight.clone()
    dcpsvc.load(store, {"model": model}, skip=["model.head", "model.tied"])
    assert same(model.encoder, trained["model"].encoder)
    assert torch.equal(model.head.weight, kept)
    assert store.given_out <= nbytes(model.encoder, model.frozen) + SLACK


def test_a_module_that_has_only_a_beginning_of_the_names_reads_only_those(
    store: Counting, trained: dict[str, Any]
) -> None:
    part = nn.ModuleDict({"encoder": Model().encoder})
    dcpsvc.load(store, {"model": part}, strict=False)
    assert same(part["encoder"], trained["model"].encoder)
    assert store.given_out <= nbytes(part) + SLACK


def test_a_model_built_without_memory_gets_it_from_what_is_read(store: Counting, trained: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = Model()
    dcpsvc.load(store, {"model": model})
    assert same(model, trained["model"])
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert model.tied.weight is model.head.weight
    assert isinstance(model.encoder[0].weight, nn.Parameter)
    assert not model.frozen.weight.requires_grad
    assert model.head.weight.requires_grad
    assert store.given_out <= nbytes(model) + SLACK


def test_an_optimizer_of_parameters_without_memory_is_refused_before_anything_is_touched(store: Counting) -> None:
    with torch.device("meta"):
        model = Model()
    with pytest.raises(RestoreFailedError, match=r"to_empty"):
        dcpsvc.load(store, {"model": model, "optim": torch.optim.AdamW(model.parameters())})
    assert model.head.weight.device.type == "meta"
