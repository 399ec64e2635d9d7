"""An optimizer that has state already is read into that state, when all is proven; its memory is not needed twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import dcpsvc
from dcpsvc.errors import NoValidCheckpointError

if TYPE_CHECKING:
    from torch.optim import Optimizer

MIB = 2**20


def trained(value: float, width: int = 1000) -> tuple[torch.nn.Linear, torch.optim.Adam]:
    model = torch.nn.Linear(width, width)
    optimizer = torch.optim.Adam(model.parameters(), lr=value)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()
    return model, optimizer


def save(folder: Path, model: torch.nn.Module, optimizer: Optimizer) -> Path:
    state = {"model": model, "optim": optimizer}
    with dcpsvc.Checkpointer(folder / "root", state, local=folder / "local", save_last=False) as ckpt:
        ckpt.save(1).wait(60)
    return folder / "root"


def moments(model: torch.nn.Module, optimizer: Optimizer) -> list[torch.Tensor]:
    return [optimizer.state[p][name] for p in model.parameters() for name in ("exp_avg", "exp_avg_sq")]


def everything(model: torch.nn.Module, optimizer: Optimizer) -> list[torch.Tensor]:
    steps = [optimizer.state[parameter]["step"] for parameter in model.parameters()]
    return [*(parameter.detach() for parameter in model.parameters()), *moments(model, optimizer), *steps]


def test_moments_stay_where_they_are_and_have_the_saved_values(tmp_path: Path) -> None:
    saved = trained(0.5)
    root = save(tmp_path, *saved)
    model, optimizer = trained(2.0)
    places = [moment.data_ptr() for moment in moments(model, optimizer)]
    assert dcpsvc.load(root, {"model": model, "optim": optimizer}) == 1
    assert [moment.data_ptr() for moment in moments(model, optimizer)] == places
    assert all(map(torch.equal, everything(model, optimizer), everything(*saved)))


@pytest.mark.parametrize("at", range(5))
def test_a_damaged_block_wherever_it_is_leaves_model_and_optimizer_as_they_were_to_the_bit(
    tmp_path: Path, at: int
) -> None:
    root = save(tmp_path, *trained(0.5))
    (shard,) = (root / "data").rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[(len(data) - MIB // 2) * at // 4] ^= 1
    shard.write_bytes(data)
    model, optimizer = trained(2.0)
    before = [tensor.clone() for tensor in everything(model, optimizer)]
    with pytest.raises(NoValidCheckpointError):
        dcpsvc.load(root, {"model": model, "optim": optimizer})
    assert all(map(torch.equal, everything(model, optimizer), before))


def test_a_file_that_was_cut_short_leaves_model_and_optimizer_as_they_were_to_the_bit(tmp_path: Path) -> None:
    root = save(tmp_path, *trained(0.5))
    (shard,) = (root / "data").rglob("*.safetensors")
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - MIB)
    model, optimizer = trained(2.0)
    before = [tensor.clone() for tensor in everything(model, optimizer)]
    with pytest.raises(NoValidCheckpointError):
        dcpsvc.load(root, {"model": model, "optim": optimizer})
    assert all(map(torch.equal, everything(model, optimizer), before))


@pytest.mark.parametrize("began", [True, False])
def test_resuming_takes_a_few_pieces_of_memory_more_than_the_state_whether_training_has_begun_or_not(
    tmp_path: Path, *, began: bool
) -> None:
    root = save(tmp_path, *trained(0.5, width=4096))
    model = torch.nn.Linear(4096, 4096)
    optimizer = torch.optim.Adam(model.parameters())
    if began:
        model, optimizer = trained(2.0, width=4096)
    new_nbytes = 0 if began else 2 * sum(parameter.nbytes for parameter in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = resident("VmRSS")
    assert dcpsvc.load(root, {"model": model, "optim": optimizer}) == 1
    assert resident("VmHWM") - before < new_nbytes + 64 * MIB


def resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024
