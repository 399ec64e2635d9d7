"""R27 R31: the quantized weights and optimizer states of torchao, as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from tests.unit.one_process import bits, resume, save

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

torchao: Any = pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

WEIGHTS = ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"]
OPTIMIZERS = ["AdamW8bit", "AdamW4bit", "AdamWFp8"]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Its optimizers are compiled, which takes a minute and needs a C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


def inside(tensor: Any) -> Any:
    if not hasattr(tensor, "__tensor_flatten__"):
        return bits(tensor) if isinstance(tensor, torch.Tensor) else tensor
    return {name: inside(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]}


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))


@pytest.mark.parametrize("config", WEIGHTS)
def test_quantized_weights_come_back_bit_for_bit(tmp_path: Path, config: str) -> None:
    quantization: Any = pytest.importorskip("torchao.quantization")
    one, other = model(1).bfloat16(), model(2).bfloat16()
    for each in (one, other):
        quantization.quantize_(each, getattr(quantization, config)())
    assert hasattr(one[0].weight, "__tensor_flatten__")
    save(tmp_path, {"model": one})
    resume(tmp_path, {"model": other})
    assert [inside(tensor) for tensor in other.parameters()] == [inside(tensor) for tensor in one.parameters()]
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(one(x), other(x))


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    torch.manual_seed(0)
    for _ in range(steps):
        network(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_of_few_bits_goes_on_bit_for_bit_in_a_new_one(tmp_path: Path, kind: str) -> None:
    make: Any = getattr(pytest.importorskip("torchao.optim"), kind)
    one, other = model(1), model(2)
    optimizer, fresh = make(one.parameters(), lr=0.01), make(other.parameters(), lr=0.01)
    train(one, optimizer, 3)
    save(tmp_path, {"model": one, "optim": optimizer})
    resume(tmp_path, {"model": other, "optim": fresh})
    assert hasattr(fresh.state[other[0].weight]["exp_avg"], "__tensor_flatten__")
    for network, its in ((one, optimizer), (other, fresh)):
        train(network, its, 3)
    state = [
        [inside(value) for value in its.state[p].values()]
        for its, n in ((optimizer, one), (fresh, other))
        for p in n.parameters()
    ]
    assert state[:4] == state[4:]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
