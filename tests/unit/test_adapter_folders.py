"""R34: what becomes part of a folder of PEFT beside a checkpoint, what does not, and what is said of it."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dcpsvc
from dcpsvc import Event, Point
from dcpsvc.errors import ConfigError, ExportError, SaveFailedError
from dcpsvc.format import peft
from dcpsvc.format.layout import Chunk, Tensor
from dcpsvc.format.safetensors import Entry
from dcpsvc.format.shardfile import Piece
from dcpsvc.reading import open_root
from dcpsvc.stages import discover
from dcpsvc.tools import adapterfolder, exporting
from dcpsvc.tools.exporting import Source
from tests.unit.one_process import save
from tests.unit.scaled import Layer, scaled

SECONDS = 30
BAD = ["/home/u/x", "../x", "..", ".hidden", "my adapter", "süß", "a/b", ""]


class Config:
    """As PEFT's is, as far as a checkpoint looks."""

    def to_dict(self) -> dict[str, Any]:
        return {"peft_type": "LORA"}


class Adapted(nn.Module):
    """A layer as PEFT leaves it: with a factor for each adapter, the last of which is trained."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.lora_A = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in names})
        self.peft_config = {name: Config() for name in names}
        self.requires_grad_(requires_grad=False)
        self.base_model.lora_A[names[-1]].requires_grad_()


def entry(name: str) -> Entry:
    return Entry(name, f"model.{name}", Tensor.of("F32", (1,), [Chunk(0, (0,), (1,), 0)]), "F32")


def about(*names: str) -> dict[str, Any]:
    return {"peft": {"": {name: {} for name in names}}}


def folder(path: Path) -> dict[str, Path]:
    """Files of the newest checkpoint's folder."""
    (found,) = (path / "root" / "data").glob("step-000000000001*/adapter")
    return {str(file.relative_to(found)): file for file in found.rglob("*") if file.is_file()}


def keeping(path: Path, model: nn.Module, *steps: int, **options: Any) -> None:
    with dcpsvc.Checkpointer(
        path / "root", {"model": model}, local=path / "local", adapter_folder="model", save_last=False, **options
    ) as ckpt:
        for step in steps or (1,):
            ckpt.save(step).wait(SECONDS)


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD)
def test_an_adapter_whose_name_is_no_directory_below_the_folder_is_refused_by_name(name: str) -> None:
    there = [entry(f"base_model.lora_A.{one}.weight") for one in ("default", name)]
    with pytest.raises(ExportError, match=r"model: the adapter .* would be a directory of that name") as caught:
        peft.adapters("model", about("default", name), there)
    assert repr(name) in str(caught.value)


def test_an_export_writes_nothing_outside_of_its_directory(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as there:  # no module has a name with a point in it: tmp_path may
        elsewhere = Path(there) / "elsewhere"
        save(tmp_path, {"model": Adapted(str(elsewhere), "default")})
        with pytest.raises(ExportError, match=r"the adapter '/.*elsewhere' would be a directory"):
            exporting.export_peft(Source(open_root(tmp_path / "root"), 1, "model"), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not elsewhere.exists()


@pytest.mark.parametrize("component", ["model", "model.inside"])
def test_such_a_name_is_found_before_the_training_begins(tmp_path: Path, component: str) -> None:
    model = nn.ModuleDict({"inside": Adapted("default", "my adapter"), "other": nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match=f"adapter_folder='{component}': the adapter 'my adapter' would be a dir"):
        dcpsvc.Checkpointer(tmp_path / "root", {"model": model}, local=tmp_path / "local", adapter_folder=component)
    assert not (tmp_path / "root").exists()


def test_such_a_name_elsewhere_in_the_model_is_no_concern_of_the_folder(tmp_path: Path) -> None:
    model = nn.ModuleDict({"inside": Adapted("default"), "other": Adapted("my adapter")})
    places: dict[str, Any] = {"local": tmp_path / "local", "adapter_folder": "model.inside", "save_last": False}
    with dcpsvc.Checkpointer(tmp_path / "root", {"model": model}, **places) as ckpt:
        ckpt.save(1).wait(SECONDS)
    assert sorted(folder(tmp_path)) == [peft.CONFIG, peft.MODEL]


# --- adapters that are not trained ------------------------------------------------------------------


def test_an_adapter_of_which_nothing_is_saved_is_left_out_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dcpsvc"):
        keeping(tmp_path, Adapted("reference", "default"), 1, 2, only="trainable")
    assert sorted(folder(tmp_path)) == [peft.CONFIG, peft.MODEL]
    assert caplog.text.count("without the adapters reference: nothing of them is saved") == 1


def test_all_adapters_are_in_the_folder_where_all_is_saved(tmp_path: Path) -> None:
    keeping(tmp_path, Adapted("reference", "default"))
    files = [peft.CONFIG, peft.MODEL, f"reference/{peft.CONFIG}", f"reference/{peft.MODEL}"]
    assert sorted(folder(tmp_path)) == files


def test_a_model_of_whose_adapters_nothing_is_saved_has_no_folder(tmp_path: Path) -> None:
    model = Adapted("reference", "default").requires_grad_(requires_grad=False)
    model.bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(SaveFailedError, match="holds no tensor of the adapters default, reference"):
        keeping(tmp_path, model, only="trainable")


# --- its size, before it is made ------------------------------------------------------------------------


def rows(key: str, first: int, last: int) -> Piece:
    """Rows of a tensor of 6 by 2 float32."""
    return Piece(key, "F32", (6, 2), (first, 0), (last - first, 2))


def test_what_the_shards_hold_of_the_adapters_adds_up_to_the_tensors_of_the_folder() -> None:
    names = [f"model.base_model.lora_A.{one}.weight" for one in ("default", "reference")]
    base, other = rows("model.base_model.weight", 0, 6), rows("optim.base_model.lora_A.default.weight", 0, 6)
    shards = [[rows(names[0], 0, 2), base], [rows(names[0], 2, 6), rows(names[1], 0, 5), other], [base]]
    held = [peft.held_nbytes("model", about("default", "reference"), pieces) for pieces in shards]
    assert held == [2 * 8, (4 + 5) * 8, 0]


@pytest.mark.parametrize(("component", "told"), [("model", {}), ("other", about("default")), ("model", about("a/b"))])
def test_of_a_module_that_no_folder_is_made_of_nothing_is_counted(component: str, told: dict[str, Any]) -> None:
    pieces = [rows(f"model.base_model.lora_A.{name}.weight", 0, 6) for name in ("default", "a/b")]
    assert peft.held_nbytes(component, told, pieces) == 0


@pytest.mark.parametrize("wrap", [dcpsvc.Replicated, dcpsvc.Part])
def test_the_tensors_of_a_folder_are_needed_on_the_disk_from_the_beginning_until_it_is_made(
    tmp_path: Path, wrap: Any
) -> None:
    needed: list[int] = []

    def look(event: Event) -> None:
        if event.name == Point.SHARD_WRITTEN:
            needed.append(saver._disk_need().folder_nbytes)

    with dcpsvc.Checkpointer(
        tmp_path / "root", {"model": wrap(Adapted("reference", "default"))}, local=tmp_path / "local",
        adapter_folder="model", save_last=False, on_event=look,
    ) as ckpt:  # fmt: skip
        saver = ckpt._saver
        predicted = saver.predicted()
        ckpt.save(1).wait(SECONDS)
        needed.append(saver._disk_need().folder_nbytes)
    tensors = [load_file(file) for name, file in folder(tmp_path).items() if name.endswith(peft.MODEL)]
    assert predicted is not None
    assert predicted.folder_nbytes == sum(tensor.nbytes for found in tensors for tensor in found.values()) > 0
    assert needed == [predicted.folder_nbytes, 0]


# --- tensors made of others ---------------------------------------------------------------------------


def quantized() -> nn.Module:
    model = Adapted("default")
    model.base_model.lora_A["default"] = Layer(scaled(1))
    return model


def test_an_adapter_of_tensors_made_of_others_has_no_folder_and_is_named_by_key(tmp_path: Path) -> None:
    with pytest.raises(SaveFailedError, match=r"model\.base_model\.lora_A\.default\.weight: is made of others"):
        keeping(tmp_path, quantized())
    assert not list((tmp_path / "root").glob("data/*/adapter/*"))


@pytest.mark.parametrize("inside", [".numbers", "@1.numbers", ""], ids=["whole", "a rank's", "itself"])
def test_what_is_inside_of_a_tensor_made_of_others_is_told_from_what_stands_for_itself(inside: str) -> None:
    weight = "model.base_model.lora_A.default.weight"
    found = peft.outer([entry("first.weight"), entry(f"base_model.lora_A.default.weight{inside}")], {weight})
    assert found == (weight if inside else "")


def test_neither_is_a_folder_of_it_made_by_an_edit(tmp_path: Path) -> None:
    save(tmp_path, {"model": quantized()})
    store = open_root(tmp_path / "root")
    (attempt,) = discover.committed(store)
    shards, layout = discover.read_manifest(store, attempt).shards, dcpsvc.storage_reader(tmp_path / "root").layout
    with pytest.raises(ExportError, match=r"model\.base_model\.lora_A\.default\.weight: is made of others"):
        adapterfolder.remake(store, attempt, shards, layout, "model")
    assert not list((tmp_path / "root").glob("data/*/adapter/*"))
