"""R33 R34 R35: what other libraries wrote becomes a committed checkpoint, and nothing in it is executed."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

import dcpsvc
from dcpsvc.commandline.exporting import export_command
from dcpsvc.commandline.importing import import_command
from dcpsvc.errors import DestinationError, ForeignFormatError, StoreError
from dcpsvc.storage import open as stores
from dcpsvc.tools import foreign
from dcpsvc.tools.importing import Import
from tests.unit.one_process import bits
from tests.unit.training import seed

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),  # of the libraries
]


def model(number: int = 0) -> nn.Module:
    seed(number)
    found = nn.Sequential(
        nn.Embedding(10, 4), nn.Linear(4, 6).bfloat16(), nn.BatchNorm1d(6), nn.Linear(4, 10, bias=False)
    )
    found[3].weight = found[0].weight
    return found


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(import_command, [str(each) for each in arguments])


def exported(*arguments: Any) -> Any:
    return CliRunner().invoke(export_command, [str(each) for each in arguments], catch_exceptions=False)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and bits(x) == bits(y) for (a, x), (b, y) in pairs)


def untied(net: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items() if key != "3.weight"}


def written(kind: str, path: Path, net: nn.Module) -> Path:
    """A model as others write it."""
    if kind == "torch":
        torch.save({"epoch": 3, "net": net.state_dict()}, path / "model.pt")
        return path / "model.pt"
    folder = path / kind
    folder.mkdir()
    if kind == "dcp":
        dcp.save({"net": net.state_dict(), "epoch": 3}, checkpoint_id=folder, no_dist=True)
    elif kind == "hf":
        whole = {f"net.{key}": value for key, value in untied(net).items()}
        names = {"a.safetensors": list(whole)[:3], "b.safetensors": list(whole)[3:]}
        for file, keys in names.items():
            save_file({key: whole[key] for key in keys}, folder / file)
        weight_map = {key: file for file, keys in names.items() for key in keys}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("kind", ["hf", "dcp", "torch"])
def test_what_was_taken_is_loaded_bit_for_bit_and_tied_weights_stay_tied(tmp_path: Path, kind: str) -> None:
    source = written(kind, tmp_path, model())
    result = run(source, tmp_path / "root", 7, "--prefix", "net", "--max-shard-mib", 1)
    assert result.exit_code == 0
    assert f"from {kind}" in result.output
    assert ("not taken: epoch" in result.output) == (kind != "hf")
    net = model(1)
    assert dcpsvc.load(tmp_path / "root", {"model": net}) == 7
    assert same(net, model())
    assert net[3].weight is net[0].weight


def test_training_resumes_from_what_was_taken_and_the_next_commit_is_its_own(tmp_path: Path) -> None:
    run(written("hf", tmp_path, model()), tmp_path / "root", "--prefix", "net")
    net = model(1)
    with dcpsvc.Checkpointer(tmp_path / "root", {"model": net}, local=tmp_path / "disk") as ckpt:
        assert ckpt.resume() == 0
        assert same(net, model())
        ckpt.save(5).wait()
    assert [found.step for found in dcpsvc.list_checkpoints(tmp_path / "root")] == [0, 5]
    assert run(tmp_path / "hf", tmp_path / "root", 4, "--prefix", "net").exception.__class__ is DestinationError


def losses(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[str]:
    """Of training that draws its batches by the number of the step."""
    found: list[str] = []
    for step in steps:
        batch = torch.randint(10, (8,), generator=torch.Generator().manual_seed(step))
        loss = net[3](net[2](net[1](net[0](batch).bfloat16()).float())[:, :4]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()).hex())
    return found


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": net[:2].parameters()}, {"params": net[2].parameters(), "lr": 0.01}]
    return torch.optim.AdamW(groups, lr=0.1)


@pytest.mark.parametrize("kind", ["dcp", "dcp, flattened", "torch"])
def test_training_goes_on_bit_for_bit_from_the_optimizer_that_plain_dcp_saved(tmp_path: Path, kind: str) -> None:
    net = model()
    optimizer = adamw(net)
    losses(net, optimizer, range(5))
    options = StateDictOptions(flatten_optimizer_state_dict=kind == "dcp, flattened")
    model_state, optimizer_state = get_state_dict(net, optimizer, options=options)
    state = {"model": model_state, "optim": optimizer_state}
    source = tmp_path / "given"
    if kind == "torch":
        torch.save(state, source)
    else:
        dcp.save(state, checkpoint_id=source, no_dist=True)
    straight = losses(net, optimizer, range(5, 10))
    done = run(source, tmp_path / "root", 5, "--prefix", "model", "--optimizer", "optim")
    assert done.exit_code == 0, done.exception
    fresh = model(1)
    resumed = {"model": fresh, "optim": adamw(fresh)}
    with dcpsvc.Checkpointer(tmp_path / "root", resumed, local=tmp_path / "disk", save_last=False) as ckpt:
        assert ckpt.resume() == 5
        assert losses(fresh, resumed["optim"], range(5, 10)) == straight


def test_an_optimizer_whose_parameters_are_numbers_is_refused_with_the_remedy(tmp_path: Path) -> None:
    net = model()
    optimizer = adamw(net)
    losses(net, optimizer, range(1))
    torch.save({"model": net.state_dict(), "optim": optimizer.state_dict()}, tmp_path / "given")
    result = run(tmp_path / "given", tmp_path / "root", "--prefix", "model", "--optimizer", "optim")
    assert isinstance(result.exception, ForeignFormatError)
    assert "its parameters have no names; save it with get_state_dict()" in str(result.exception)
    assert not (tmp_path / "root").exists()


def test_names_are_mapped_and_numbers_are_cast_as_asked(tmp_path: Path) -> None:
    source = written("torch", tmp_path, model())
    options = ("--prefix", "net", "--rename", "1=up.linear", "--dtype", "F64", "--component", "policy")
    assert run(source, tmp_path / "root", *options).exit_code == 0
    layout = dcpsvc.storage_reader(tmp_path / "root").layout
    assert {"policy.up.linear.weight", "policy.0.weight"} <= set(layout.names())
    assert {tensor.dtype for tensor in layout.tensors.values()} == {"F64", "I64"}
    assert layout.aliases == {"policy.3.weight": "policy.0.weight"}


def test_tensors_that_no_copy_was_made_of_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    torch.save(
        {"t": whole.t(), "part": whole[1:3, ::2], "one": torch.tensor(3), "none": torch.empty(0, 4)}, tmp_path / "f"
    )
    run(tmp_path / "f", tmp_path / "root")
    reader = dcpsvc.storage_reader(tmp_path / "root")
    found = {name: torch.empty(tensor.shape) for name, tensor in reader.layout.tensors.items()}
    found["model.one"] = torch.tensor(0)
    dcp.load(found, storage_reader=reader, no_dist=True)
    assert torch.equal(found["model.t"], whole.t())
    assert torch.equal(found["model.part"], whole[1:3, ::2])
    assert found["model.one"] == 3
    assert found["model.none"].shape == (0, 4)


# --- nothing is executed ------------------------------------------------------------------------------


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_torch_file_that_needs_code_is_refused_and_none_of_it_runs(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "x": Bomb(tmp_path / "boom")}, tmp_path / "bad.pt")
    result = run(tmp_path / "bad.pt", tmp_path / "root")
    assert isinstance(result.exception, ForeignFormatError)
    assert "without executing what is in it: Trying to load unsupported GLOBAL posix.mkdir" in str(result.exception)
    assert not (tmp_path / "boom").exists()
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("where", ["metadata", "tensor"])
def test_a_dcp_directory_that_needs_code_is_refused_and_none_of_it_runs(tmp_path: Path, where: str) -> None:
    source = written("dcp", tmp_path, model())
    if where == "metadata":
        (source / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    else:
        places = dcp.FileSystemReader(source).read_metadata().storage_data
        place = next(where for index, where in places.items() if index.fqn == "net.0.weight")
        with (source / place.relative_path).open("r+b") as file:
            file.seek(place.offset)
            file.write(pickle.dumps(Bomb(tmp_path / "boom"), protocol=2))
    result = run(source, tmp_path / "root")
    assert isinstance(result.exception, ForeignFormatError)
    assert not (tmp_path / "boom").exists()
    assert not list((tmp_path / "root").glob("manifests/order-*"))


# --- damage -------------------------------------------------------------------------------------------


def damaged(folder: Path, how: str) -> str:
    file, index = folder / "b.safetensors", folder / "model.safetensors.index.json"
    if how == "cut short":
        file.write_bytes(file.read_bytes()[:-5])
        return "bytes"
    if how == "no header":
        file.write_bytes(struct.pack("<Q", 1 << 40) + b"x")
        return "a header of"
    if how == "a file is missing":
        file.unlink()
        return "names b.safetensors"
    text = index.read_text()
    index.write_text(text.replace("b.safetensors", "../b.safetensors") if how == "outside" else text[:-5])
    return "names b.safetensors" if how == "outside" else "not JSON"


@pytest.mark.parametrize("how", ["cut short", "no header", "a file is missing", "outside", "no index"])
def test_a_damaged_folder_is_refused_by_name_and_nothing_is_committed(tmp_path: Path, how: str) -> None:
    source = written("hf", tmp_path, model())
    expected = damaged(source, how)
    result = run(source, tmp_path / "root")
    assert isinstance(result.exception, ForeignFormatError)
    assert expected in str(result.exception)
    assert not list((tmp_path / "root").glob("manifests/order-*"))


def test_an_import_that_was_cut_short_goes_on_under_its_attempt_and_sends_no_shard_twice(tmp_path: Path) -> None:
    whole = {f"layer{n}": torch.randn(300_000, generator=torch.Generator().manual_seed(n)) for n in range(4)}
    (tmp_path / "hf").mkdir()
    save_file(whole, tmp_path / "hf" / "model.safetensors")
    target = stores.open_store(str(tmp_path / "root"), {})

    def work() -> Import:
        return Import(found=foreign.find_hf(tmp_path / "hf"), target=target, step=3, max_shard_nbytes=1 << 20)

    read = 0

    def stop(nbytes: int) -> None:
        nonlocal read
        read += nbytes
        if read > 3_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work().commit(stop)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "root" / "data").rglob("*.safetensors")}
    assert len(before) == 2
    manifest = work().commit(lambda _: None)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "root" / "data").rglob("*.safetensors")}
    assert manifest.attempt.startswith("1-")
    assert len(after) == 4
    assert {name: after[name] for name in before} == before
    state = {"model": nn.ParameterDict({name: nn.Parameter(torch.zeros(300_000)) for name in whole})}
    dcpsvc.load(tmp_path / "root", state)
    assert all(torch.equal(state["model"][name], value) for name, value in whole.items())


def test_folders_are_taken_without_torch_and_without_the_library_that_wrote_them(tmp_path: Path) -> None:
    source = written("hf", tmp_path, model())
    code = (
        "import sys\nfrom dcpsvc.cli import cli\n"
        f"cli(['import', {str(source)!r}, {str(tmp_path / 'root')!r}], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'safetensors') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- the libraries themselves -------------------------------------------------------------------------


def test_a_model_of_transformers_goes_in_and_out_and_computes_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    seed(0)
    net = transformers.GPT2LMHeadModel(config).eval()
    net.save_pretrained(tmp_path / "given", max_shard_size="3KB")
    assert run(tmp_path / "given", tmp_path / "root", 1).exit_code == 0
    seed(1)
    other = transformers.GPT2LMHeadModel(config).eval()
    dcpsvc.load(tmp_path / "root", {"model": other})
    x = torch.arange(6)[None]
    assert torch.equal(other(x).logits, net(x).logits)
    assert exported(tmp_path / "root", 1, tmp_path / "out", "--format", "hf").exit_code == 0
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(x).logits, net(x).logits)


def test_an_adapter_of_peft_goes_in_is_loaded_and_goes_out_again(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def wrapped(number: int) -> Any:
        seed(0)
        base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        seed(number)
        return peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], modules_to_save=["2"], r=2))

    net = wrapped(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    net.save_pretrained(tmp_path / "given")
    assert run(tmp_path / "given", tmp_path / "root", 1).exit_code == 0
    other = wrapped(2)
    state = {"model": other}
    with dcpsvc.Checkpointer(
        tmp_path / "root", state, local=tmp_path / "disk", only="trainable", save_last=False
    ) as ckpt:
        assert ckpt.resume() == 1
    x = torch.randn(2, 4)
    assert torch.equal(other(x), net(x))
    assert exported(tmp_path / "root", 1, tmp_path / "out", "--format", "peft").exit_code == 0
    base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    base.load_state_dict({k.replace("base_layer.", ""): v for k, v in plain(net).items()})
    again = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    assert torch.equal(again(x), net(x))


def plain(net: Any) -> dict[str, torch.Tensor]:
    """The base's weights, as they were before PEFT."""
    found = {}
    for key, value in net.base_model.model.state_dict().items():
        if "lora_" not in key and "modules_to_save" not in key:
            found[key.replace("original_module.", "")] = value
    return found


def test_an_import_that_the_store_refuses_leaves_no_commit(tmp_path: Path) -> None:
    source = written("hf", tmp_path, model())
    (tmp_path / "root").write_text("a file")
    result = run(source, tmp_path / "root")
    assert isinstance(result.exception, StoreError | dcpsvc.RootError)
