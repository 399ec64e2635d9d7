"""Modules through a real Checkpointer in one process: saved, and loaded into a fresh object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dcpsvc import Checkpointer, Latest
from dcpsvc.errors import SaveFailedError, UnsupportedStateError
from tests.unit.models import assert_same, model
from tests.unit.one_process import bits, resume, save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


class Remembering(nn.Linear):
    """Has an extra state."""

    memory: Any = None

    def get_extra_state(self) -> Any:
        return self.memory

    def set_extra_state(self, state: Any) -> None:
        self.memory = state


def shard_names(folder: Path) -> set[str]:
    (path,) = (folder / "root" / "data").glob("*/rank-00000.safetensors")
    with safe_open(path, framework="pt") as file:
        return {name for name in file.keys() if not name.startswith("__dcpsvc__")}  # noqa: SIM118 - not a dict


def test_a_module_comes_back_with_its_buffers(tmp_path: Path) -> None:
    saved, fresh = model(0), model(1)
    saved(torch.randn(8, 4))
    save(tmp_path, {"model": saved}, step=40)
    assert resume(tmp_path, {"model": fresh}) == 40
    assert_same(fresh, saved)
    assert fresh[1].num_batches_tracked == 1


def test_the_shard_holds_every_tensor_under_the_models_own_name(tmp_path: Path) -> None:
    save(tmp_path, {"model": model(0)})
    assert shard_names(tmp_path) == {f"model.{name}" for name in model(0).state_dict()}


def test_loading_keeps_the_parameters_that_an_optimizer_knows(tmp_path: Path) -> None:
    save(tmp_path, {"model": model(0)})
    fresh = model(1)
    parameters = list(fresh.parameters())
    resume(tmp_path, {"model": fresh})
    assert all(now is before for now, before in zip(fresh.parameters(), parameters, strict=True))


def test_tied_weights_are_stored_once_and_are_tied_after_loading(tmp_path: Path) -> None:
    saved, fresh = Tied(), Tied()
    save(tmp_path, {"model": saved})
    assert shard_names(tmp_path) == {"model.embedding.weight"}
    resume(tmp_path, {"model": fresh})
    assert fresh.head.weight is fresh.embedding.weight
    assert torch.equal(fresh.head.weight, saved.head.weight)


def test_a_model_that_unties_its_weights_gets_both(tmp_path: Path) -> None:
    saved, fresh = Tied(), Tied()
    fresh.head.weight = nn.Parameter(torch.zeros(10, 4))
    save(tmp_path, {"model": saved})
    resume(tmp_path, {"model": fresh})
    assert torch.equal(fresh.head.weight, saved.head.weight)
    assert torch.equal(fresh.embedding.weight, saved.embedding.weight)


@pytest.mark.parametrize("wrap", [lambda module: torch.compile(module, backend="eager"), lambda module: module])
def test_a_compiled_model_has_the_names_of_the_model_inside(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    saved, fresh = model(0), model(1)
    save(tmp_path, {"model": torch.compile(saved, backend="eager")})
    assert shard_names(tmp_path) == {f"model.{name}" for name in saved.state_dict()}
    resume(tmp_path, {"model": wrap(fresh)})
    assert_same(fresh, saved)


def test_a_compiled_part_of_a_model_has_the_names_of_the_part_inside(tmp_path: Path) -> None:
    saved, fresh = model(0), model(1)
    saved[0] = torch.compile(saved[0], backend="eager")
    save(tmp_path, {"model": saved})
    resume(tmp_path, {"model": fresh})
    assert torch.equal(fresh[0].weight, saved[0].weight)
    assert not any("_orig_mod" in name for name in shard_names(tmp_path))


@pytest.mark.parametrize("memory", [{"seen": 3, "names": ("a", b"\0")}, [1.5, None], 7])
def test_an_extra_state_comes_back(tmp_path: Path, memory: Any) -> None:
    saved, fresh = nn.Sequential(Remembering(2, 2)), nn.Sequential(Remembering(2, 2))
    saved[0].memory, fresh[0].memory = memory, "of before"
    save(tmp_path, {"model": saved})
    resume(tmp_path, {"model": fresh})
    assert fresh[0].memory == memory


def test_a_tensor_in_an_extra_state_is_refused_by_name(tmp_path: Path) -> None:
    module = nn.Sequential(Remembering(2, 2))
    module[0].memory = {"mean": torch.ones(1)}
    with (
        pytest.raises(SaveFailedError, match=r"model\.0\._extra_state"),
        Checkpointer(tmp_path / "root", {"model": module}, local=tmp_path / "local") as ckpt,
        pytest.raises(UnsupportedStateError, match="register it as a buffer"),
    ):
        ckpt.save(1)


def test_saving_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    saved = model(0)
    saved(torch.randn(8, 4)).sum().backward()
    before = {name: (bits(p), bits(p.grad), p.requires_grad) for name, p in saved.named_parameters()}
    save(tmp_path, {"model": saved})
    assert {name: (bits(p), bits(p.grad), p.requires_grad) for name, p in saved.named_parameters()} == before


def test_what_changes_after_save_has_returned_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    saved, fresh = model(0), model(1)
    with Checkpointer(tmp_path / "root", {"model": saved}, local=tmp_path / "local", keep=Latest(1)) as ckpt:
        ckpt.save(1)
        with torch.no_grad():
            for parameter in saved.parameters():
                parameter.zero_()
    resume(tmp_path, {"model": fresh})
    assert_same(fresh, model(0))


class AsTheyWrap(nn.Module):
    """A model whose parts are wrapped; one part is called as wrappers call what is inside."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.encoder = wrap(nn.Sequential(wrap(Remembering(2, 2)), nn.LayerNorm(2)))
        self.module = nn.Linear(2, 2)
        self.register_buffer("scale", torch.ones(2))


NAMES = {"encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias", "module.weight", "module.bias"}


def compiled_in_parallel(part: nn.Module) -> nn.Module:
    return nn.DataParallel(torch.compile(part, backend="eager"))


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, compiled_in_parallel])
@pytest.mark.parametrize("around", [lambda module: module, nn.DataParallel, AveragedModel])
def test_wrapped_parts_have_the_names_of_the_parts_inside(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module], around: Callable[[nn.Module], nn.Module]
) -> None:
    saved, fresh = around(AsTheyWrap(wrap)), AsTheyWrap(lambda part: part)
    inside = [each for each in saved.modules() if isinstance(each, Remembering)][0]  # noqa: RUF015 - as it reads
    inside.memory = "seen"
    save(tmp_path, {"model": saved})
    names = {name for name in shard_names(tmp_path) if not name.endswith("n_averaged")}
    assert names == {f"model.{name}" for name in (*NAMES, "scale")}
    resume(tmp_path, {"model": fresh}, strict=False)
    assert fresh.encoder[0].memory == "seen"
    assert [bits(p) for p in fresh.parameters()] == [bits(p) for p in saved.parameters()]


def test_an_averaged_copy_goes_on_averaging(tmp_path: Path) -> None:
    saved, fresh = AveragedModel(model(0)), AveragedModel(model(1))
    saved.update_parameters(model(2))
    save(tmp_path, {"ema": saved})
    resume(tmp_path, {"ema": fresh})
    for each in (saved, fresh):
        each.update_parameters(model(3))
    assert fresh.n_averaged == 2
    assert_same(fresh, saved)
