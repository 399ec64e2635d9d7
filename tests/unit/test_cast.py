"""A module stored in another dtype: half the bytes, cast while it is copied, and cast back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from dcpsvc import Cast, Checkpointer, Rng, load
from dcpsvc.errors import RestoreFailedError, SharingError, UnsupportedStateError
from tests.unit.one_process import bits

if TYPE_CHECKING:
    from pathlib import Path


def net(seed: int, width: int = 300) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 3))


def save(folder: Path, state: dict[str, Any], **options: Any) -> int:
    with Checkpointer(folder / "root", state, local=folder / "local", save_last=False, **options) as ckpt:
        pending = ckpt.save(1)
        pending.wait(30)
    return pending.timings.nbytes


@pytest.mark.parametrize("staging_nbytes", [None, 1], ids=["staged", "streamed"])
def test_it_comes_back_as_the_narrower_dtype_has_it_and_takes_half_the_room(
    tmp_path: Path, staging_nbytes: int | None
) -> None:
    model, other = net(1), net(2)
    whole = save(tmp_path / "whole", {"model": model})
    half = save(tmp_path / "half", {"model": Cast(model, torch.bfloat16)}, staging_nbytes=staging_nbytes)
    assert half < 0.6 * whole
    assert load(tmp_path / "half" / "root", {"model": Cast(other, torch.bfloat16)}) == 1
    for (name, mine), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        expected = mine.bfloat16().float() if mine.is_floating_point() else mine
        assert bits(theirs) == bits(expected), name


def test_the_file_says_so_and_counters_stay_integers(tmp_path: Path) -> None:
    save(tmp_path, {"model": Cast(net(1), torch.float16)})
    (path,) = (tmp_path / "root" / "data").rglob("*.safetensors")
    with safe_open(path, "pt") as file:
        assert file.get_tensor("model.0.weight").dtype == torch.float16
        assert file.get_tensor("model.1.num_batches_tracked").dtype == torch.int64


def test_a_checkpoint_of_another_dtype_is_cast_on_loading_where_that_is_declared(tmp_path: Path) -> None:
    model, narrow, wide = net(1), net(2).bfloat16(), net(3).double()
    save(tmp_path, {"model": model})
    load(tmp_path / "root", {"model": Cast(narrow, torch.bfloat16)})
    load(tmp_path / "root", {"model": Cast(wide, torch.bfloat16)})
    assert bits(narrow[0].weight) == bits(model[0].weight.bfloat16())
    assert bits(wide[0].weight) == bits(model[0].weight.double())


def test_without_the_declaration_another_dtype_is_refused_by_name_and_nothing_is_touched(tmp_path: Path) -> None:
    save(tmp_path, {"model": Cast(net(1), torch.bfloat16)})
    other = net(2)
    before = bits(other[0].weight)
    with pytest.raises(RestoreFailedError, match=r"model\.0\.weight"):
        load(tmp_path / "root", {"model": other})
    assert bits(other[0].weight) == before


def test_what_cannot_be_cast_is_refused() -> None:
    with pytest.raises(UnsupportedStateError, match="Cast: cannot wrap a Rng"):
        Cast(Rng(), torch.bfloat16)
    with pytest.raises(SharingError, match=r"dtype=torch\.int8 must be one of"):
        Cast(net(1), torch.int8)
