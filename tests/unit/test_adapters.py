"""R34 R31: only what training changes is saved, over a base that is recognised."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import dcpsvc
from dcpsvc.errors import ConfigError, RestoreFailedError
from dcpsvc.state.buffers import Buffers
from tests.unit.one_process import bits, resume, save
from tests.unit.training import everything, seed

if TYPE_CHECKING:
    from pathlib import Path


class Adapted(nn.Module):
    """A frozen base with a buffer, and two factors."""

    def __init__(self) -> None:
        super().__init__()
        seed(0)
        self.base = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).requires_grad_(requires_grad=False)
        self.down, self.up = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.zeros(2, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down @ self.up


def training() -> dict[str, Any]:
    model = Adapted()
    return {"model": model, "optim": AdamW(model.parameters(), lr=0.1)}


def steps(state: dict[str, Any]) -> dict[str, Any]:
    seed(1)
    for _ in range(10):
        state["optim"].zero_grad()
        state["model"](torch.randn(4, 8)).square().sum().backward()
        state["optim"].step()
    return state


def save_adapter(folder: Path, state: dict[str, Any], step: int = 1) -> None:
    with dcpsvc.Checkpointer(folder / "root", state, local=folder / "local", only="trainable") as ckpt:
        ckpt.save(step).wait(30)


def resume_adapter(folder: Path, state: dict[str, Any], **terms: Any) -> int:
    options: dict[str, Any] = {"local": folder / "local", "save_last": False, "only": "trainable"}
    with dcpsvc.Checkpointer(folder / "root", state, **options) as ckpt:
        return ckpt.resume(**terms)


def names(folder: Path) -> list[str]:
    return [name for name in dcpsvc.storage_reader(folder / "root").layout.names() if name.startswith("model.")]


def test_only_what_training_changes_is_stored_and_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    state = steps(training())
    save_adapter(tmp_path, state)
    running = [f"model.base.1.{name}" for name in ("num_batches_tracked", "running_mean", "running_var")]
    assert names(tmp_path) == [*running, "model.down", "model.up"]
    fresh = training()
    resume_adapter(tmp_path, fresh)
    assert everything(steps(fresh)) == everything(steps(state))


@pytest.mark.parametrize("change", ["value", "name", "shape"])
def test_an_adapter_for_another_base_is_refused_and_nothing_is_touched(tmp_path: Path, change: str) -> None:
    save_adapter(tmp_path, steps(training()))
    fresh = training()
    linear = fresh["model"].base[0]
    if change == "value":
        linear.weight.data[3, 3] += 1e-6
    elif change == "name":
        fresh["model"].base.append(nn.Linear(8, 8).requires_grad_(requires_grad=False))
    else:
        fresh["model"].base[0] = nn.Linear(8, 8, bias=False).requires_grad_(requires_grad=False)
    before = bits(fresh["model"].up)
    with pytest.raises(RestoreFailedError, match=r"model\.__base__ +base"):
        resume_adapter(tmp_path, fresh)
    assert bits(fresh["model"].up) == before
    resume_adapter(tmp_path, fresh, skip=["model.__base__", "optim"])
    assert bits(fresh["model"].up) != before


def test_a_parameter_that_was_trained_and_then_frozen_is_still_stored(tmp_path: Path) -> None:
    state = steps(training())
    save_adapter(tmp_path, state, 1)
    fresh = training()
    fresh["model"].down.requires_grad_(requires_grad=False)  # from the start of this life on
    resume_adapter(tmp_path, fresh)
    assert torch.equal(fresh["model"].down, state["model"].down)
    with dcpsvc.Checkpointer(tmp_path / "root", fresh, local=tmp_path / "local", only="trainable") as ckpt:
        ckpt.resume()
        ckpt.save(2).wait(30)
    assert "model.down" in names(tmp_path)


def test_a_base_that_is_written_to_between_two_saves_is_recorded_anew(tmp_path: Path) -> None:
    state = training()
    with dcpsvc.Checkpointer(tmp_path / "root", state, local=tmp_path / "local", only="trainable") as ckpt:
        ckpt.save(1).wait(30)
        ckpt.save(2).wait(30)
        with torch.no_grad():
            state["model"].base[0].weight[0, 0] += 1
        ckpt.save(3).wait(30)
    found = [dcpsvc.storage_reader(tmp_path / "root", step).manifest.versions["base.model"] for step in (1, 2, 3)]
    assert found[0] == found[1] != found[2]


def test_a_full_checkpoint_is_loaded_into_an_adapter_run_with_its_base(tmp_path: Path) -> None:
    state = steps(training())
    with torch.no_grad():
        state["model"].base[0].weight += 1
    save(tmp_path, state)
    fresh = training()
    resume_adapter(tmp_path, fresh)
    assert everything(fresh) == everything(state)


def test_an_adapter_checkpoint_does_not_pass_for_a_full_one(tmp_path: Path) -> None:
    save_adapter(tmp_path, steps(training()))
    with pytest.raises(RestoreFailedError, match=r"model\.base\.0\.bias +missing"):
        resume(tmp_path, training())


def test_load_takes_an_adapter_over_a_base_in_memory(tmp_path: Path) -> None:
    state = steps(training())
    save_adapter(tmp_path, state)
    fresh = {"model": training()["model"]}
    dcpsvc.load(tmp_path / "root", fresh, only="trainable")
    assert torch.equal(fresh["model"].up, state["model"].up)


def test_only_must_be_something_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only='adapter'"):
        dcpsvc.Checkpointer(tmp_path / "root", training(), local=tmp_path / "local", only="adapter")


# --- buffers ----------------------------------------------------------------------------------------


class Still(nn.Module):
    """Parts of a frozen base whose buffers stay, are written to while training, are replaced, and are for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(1000.0))
        self.register_buffer("cache", torch.ones(8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache += 1
        return x + self.table[:8]


class Moving(nn.Module):
    """A codebook that follows what it sees, with no gradient, another tensor each time; and one that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("still", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        return x * self.still - self.mean


class Counting(nn.Module):
    """A counter that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        return x + self.seen


class WithBuffers(Adapted):
    """The frozen base, with a BatchNorm in train mode, and more of that kind."""

    def __init__(self) -> None:
        super().__init__()
        self.still, self.moving, self.counting = Still(), Moving(), Counting()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.counting(self.moving(self.still(x))))


def buffered() -> dict[str, Any]:
    model = WithBuffers()
    return {"model": model, "optim": AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)}


RUNNING = [f"model.base.1.{name}" for name in ("num_batches_tracked", "running_mean", "running_var")]


def test_buffers_that_training_changes_are_stored_and_the_rest_is_not_and_it_goes_on_bit_for_bit(
    tmp_path: Path,
) -> None:
    state = buffered()
    with dcpsvc.Checkpointer(tmp_path / "root", state, local=tmp_path / "local", only="trainable") as ckpt:
        ckpt.save(1).wait(30)
        assert names(tmp_path) == [*RUNNING, "model.down", "model.up"]
        steps(state)
        ckpt.save(2).wait(30)
    assert names(tmp_path) == [*RUNNING, "model.counting.seen", "model.down", "model.moving.mean", "model.up"]
    fresh = buffered()
    assert resume_adapter(tmp_path, fresh) == 2
    assert everything(steps(fresh)) == everything(steps(state))


def test_a_buffer_beside_what_is_trained_is_stored_and_one_beside_what_is_frozen_is_not(tmp_path: Path) -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("trained", "frozen")})
    model["frozen"].requires_grad_(requires_grad=False)
    for layer in model.values():
        layer.register_buffer("table", torch.ones(2))
    save_adapter(tmp_path, {"model": model})
    assert names(tmp_path) == [f"model.trained.{name}" for name in ("bias", "table", "weight")]


def test_a_buffer_that_an_earlier_life_has_changed_is_stored_by_one_that_does_not(tmp_path: Path) -> None:
    state = buffered()
    with dcpsvc.Checkpointer(tmp_path / "root", state, local=tmp_path / "local", only="trainable") as ckpt:
        steps(state)
        ckpt.save(1).wait(30)
    fresh = buffered()
    with dcpsvc.Checkpointer(tmp_path / "root", fresh, local=tmp_path / "local", only="trainable") as ckpt:
        ckpt.resume()
        ckpt.save(2).wait(30)
    again = buffered()
    assert resume_adapter(tmp_path, again) == 2
    assert everything(steps(again)) == everything(steps(state))


def test_a_buffer_that_was_written_to_before_anybody_looked_counts_as_changed() -> None:
    module = Still()
    buffers = Buffers(module, str)
    module.table += 1
    assert buffers.needed() == {"table"}
    untouched = Buffers(Still(), str)
    assert untouched.needed() == set()


def test_what_is_known_of_a_module_outlives_that_another_part_of_the_state_is_replaced(tmp_path: Path) -> None:
    state = buffered() | {"epoch": 1}
    with dcpsvc.Checkpointer(tmp_path / "root", state, local=tmp_path / "local", only="trainable") as ckpt:
        ckpt.save(1).wait(30)
        steps(state)
        state["epoch"] = 2
        ckpt.save(2).wait(30)
    assert "model.moving.mean" in names(tmp_path)


def test_a_base_with_another_buffer_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, buffered())
    fresh = buffered()
    fresh["model"].still.table[999] += 1
    with pytest.raises(RestoreFailedError, match=r"model\.__base__ +base"):
        resume_adapter(tmp_path, fresh)
    resume_adapter(tmp_path, fresh, skip=["model.__base__"])


# --- with PEFT itself -------------------------------------------------------------------------------


def peft_model() -> Any:
    """A small GPT-2 inside a module of ours, its inner model wrapped by PEFT."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    config.name_or_path = "tiny-gpt2"
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True)
    outer = nn.Module()
    outer.inner = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)
    return outer


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # between the two libraries
def test_a_peft_model_inside_another_comes_back_and_its_bytes_are_few(tmp_path: Path) -> None:
    model = peft_model()
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    save_adapter(tmp_path, {"model": model})
    assert resume_adapter(tmp_path, {"model": fresh}) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))
    stored = names(tmp_path)
    assert any("lora_A" in name for name in stored)
    assert all("lora" in name or "modules_to_save" in name for name in stored)
    (shard,) = (tmp_path / "root" / "data").glob("*/rank-00000.safetensors")
    full = tmp_path / "full"
    save(full, {"model": model})
    (whole,) = (full / "root" / "data").glob("*/rank-00000.safetensors")
    assert dcpsvc.storage_reader(tmp_path / "root").manifest.versions["base.model"].startswith("tiny-gpt2 ")
    stored_nbytes = dcpsvc.latest(tmp_path / "root").nbytes
    assert stored_nbytes == shard.stat().st_size < whole.stat().st_size
