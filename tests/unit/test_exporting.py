"""R33 R34 R35: folders that other libraries read, out of any commit."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from dcpsvc import Part
from dcpsvc.commandline.exporting import export_command
from dcpsvc.errors import CorruptShardError, ExportError, NoSuchStepError
from dcpsvc.reading import open_root
from dcpsvc.storage.posix import PosixStore
from dcpsvc.tools import casting, exporting
from dcpsvc.tools.exporting import Source
from tests.unit.one_process import bits, save
from tests.unit.training import seed

if TYPE_CHECKING:
    from pathlib import Path

QUIET = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of the libraries


def model() -> nn.Module:
    seed(0)
    found = nn.Sequential(
        nn.Embedding(10, 4), nn.Linear(4, 6).bfloat16(), nn.BatchNorm1d(6), nn.Linear(4, 10, bias=False)
    )
    found[3].weight = found[0].weight
    return found


def saved(folder: Path, **more: Any) -> dict[str, Any]:
    state = {"model": model(), "sched": {"last": 3, "rates": [0.5, 0.25]}} | more
    save(folder, state, step=7)
    return state


def source(folder: Path, component: str = "model") -> Source:
    return Source(open_root(folder / "root"), 7, component)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(export_command, [str(argument) for argument in arguments], catch_exceptions=False)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        (one[key].dtype, one[key].shape, bits(one[key])) == (other[key].dtype, other[key].shape, bits(other[key]))
        for key in one
    )


# --- hf ---------------------------------------------------------------------------------------------


def test_one_file_holds_every_tensor_once_and_bit_for_bit(tmp_path: Path) -> None:
    expected = saved(tmp_path)["model"].state_dict()
    del expected["3.weight"]  # tied to the first
    assert run(tmp_path / "root", "latest", tmp_path / "out", "--format", "hf").exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert same(load_file(tmp_path / "out" / "model.safetensors"), expected)


def test_files_are_divided_by_size_and_the_index_names_each_tensor(tmp_path: Path) -> None:
    expected = saved(tmp_path)["model"].state_dict()
    del expected["3.weight"]
    exporting.export_hf(source(tmp_path), tmp_path / "out", max_shard_nbytes=100)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {name: load_file(tmp_path / "out" / name) for name in set(index["weight_map"].values())}
    assert len(files) > 2
    assert same({key: files[name][key] for key, name in index["weight_map"].items()}, expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    for content in files.values():
        assert len(content) == 1 or sum(tensor.nbytes for tensor in content.values()) <= 100


@pytest.mark.parametrize("wanted", casting.FLOATS)
@pytest.mark.parametrize("given", casting.FLOATS)
def test_numbers_are_rounded_as_torch_rounds_them(given: str, wanted: str) -> None:
    kinds = dict(
        zip(("F64", "F32", "F16", "BF16"), (torch.float64, torch.float32, torch.float16, torch.bfloat16), strict=True)
    )
    seed(0)
    odd = torch.tensor([0.0, -0.0, 1e-40, 1e38, -3.4e38, 65504.0, 65520.0, 1 + 2**-8, 1 + 3 * 2**-8, float("inf")])
    values = torch.cat([odd.double(), torch.randn(5000).double() * 1e3]).to(kinds[given])
    found = casting.cast(values.view(torch.uint8).numpy(), given, wanted)
    assert bytes(found) == bits(values.to(kinds[wanted]))


def test_what_is_not_a_number_stays_one() -> None:
    found = casting.cast(torch.tensor([float("nan"), -float("nan")]).view(torch.uint8).numpy(), "F32", "BF16")
    assert torch.frombuffer(bytearray(found), dtype=torch.bfloat16).isnan().all()


def test_a_cast_leaves_integers_alone(tmp_path: Path) -> None:
    saved(tmp_path)
    run(tmp_path / "root", 7, tmp_path / "out", "--format", "hf", "--dtype", "F16")
    kinds = {key: tensor.dtype for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items()}
    assert kinds.pop("2.num_batches_tracked") == torch.int64
    assert set(kinds.values()) == {torch.float16}


@QUIET
def test_from_pretrained_loads_the_folder_and_computes_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    net = transformers.GPT2LMHeadModel(config).eval()
    save(tmp_path, {"model": net}, step=7)
    run(tmp_path / "root", 7, tmp_path / "out", "--format", "hf", "--max-shard-mib", 1)
    exporting.export_hf(source(tmp_path), tmp_path / "parts", max_shard_nbytes=2000)
    ids = torch.arange(6)[None]
    for folder in ("out", "parts"):
        again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / folder).eval()
        assert torch.equal(again(ids).logits, net(ids).logits)
        assert again.lm_head.weight is again.transformer.wte.weight


# --- peft -------------------------------------------------------------------------------------------


@QUIET
@pytest.mark.parametrize("inside", [False, True])
def test_peft_loads_the_adapter_over_its_base_and_computes_the_same(tmp_path: Path, *, inside: bool) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")

    def base() -> Any:
        seed(0)
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
        return transformers.GPT2LMHeadModel(config)

    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True)
    wrapped = peft.get_peft_model(base(), lora)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    outer: nn.Module = nn.ModuleDict({"lm": wrapped}) if inside else wrapped
    save(tmp_path, {"model": outer}, step=7)
    assert run(tmp_path / "root", 7, tmp_path / "out", "--format", "peft").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "out").eval()
    ids = torch.arange(6)[None]
    assert torch.equal(again(ids).logits, wrapped.eval()(ids).logits)
    assert not torch.equal(again(ids).logits, base().eval()(ids).logits)


def test_a_module_without_adapters_is_not_exported_as_peft(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ExportError, match="model: has no adapters of PEFT; --format hf"):
        exporting.export_peft(source(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- dcp and torch ----------------------------------------------------------------------------------


def test_plain_dcp_loads_the_directory(tmp_path: Path) -> None:
    state = saved(tmp_path)
    assert run(tmp_path / "root", 7, tmp_path / "out", "--format", "dcp").exit_code == 0
    fresh = model()
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    into = {"model": fresh.state_dict(), "sched": {"last": 0, "rates": []}}
    dcp.load(into, checkpoint_id=tmp_path / "out", no_dist=True)
    assert same(into["model"], state["model"].state_dict())
    assert into["sched"]["last"] == 3


def test_flat_is_refused_where_there_is_but_one_layout(tmp_path: Path) -> None:
    saved(tmp_path)
    result = run(tmp_path / "root", 7, tmp_path / "out", "--format", "torch", "--flat")
    assert result.exit_code == 2
    assert "--flat is of --format dcp" in result.output
    assert not (tmp_path / "out").exists()


def test_one_torch_file_is_the_state_dict_with_its_ties(tmp_path: Path) -> None:
    expected = saved(tmp_path)["model"].state_dict()
    assert run(tmp_path / "root", 7, tmp_path / "out", "--format", "torch").exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.pt"]
    found = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert same(found, expected)
    assert found["3.weight"].data_ptr() == found["0.weight"].data_ptr()


# --- in general -------------------------------------------------------------------------------------


def test_parts_of_a_model_are_exported_like_a_whole_one(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    save(tmp_path, {"model": Part(net)}, step=7)
    exporting.export_hf(source(tmp_path), tmp_path / "out")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), net.state_dict())


@pytest.mark.parametrize("kind", ["hf", "peft", "dcp", "torch"])
def test_nothing_is_written_into_a_directory_that_holds_something_else(tmp_path: Path, kind: str) -> None:
    saved(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(ExportError, match=r"not empty|PEFT"):
        run(tmp_path / "root", 7, tmp_path / "out", "--format", kind)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_export_that_was_cut_short_keeps_what_is_whole_and_goes_on(tmp_path: Path) -> None:
    expected = saved(tmp_path)["model"].state_dict()
    shard = next((tmp_path / "root" / "data").glob("*/*.safetensors"))
    whole = shard.read_bytes()

    class CutShort(Exception):  # noqa: N818 - what a kill would be
        pass

    def cut(_: int) -> None:
        done = list((tmp_path / "out").glob("*.safetensors"))
        if len(done) == 2:
            raise CutShort

    with pytest.raises(CutShort):
        exporting.export_hf(source(tmp_path), tmp_path / "out", max_shard_nbytes=100, progress=cut)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    with pytest.raises(ExportError, match="not empty"):
        exporting.export_hf(source(tmp_path), tmp_path / "out", max_shard_nbytes=200)
    exporting.export_hf(source(tmp_path), tmp_path / "out", max_shard_nbytes=100)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    assert before.items() < after.items()
    found = {k: t for path in (tmp_path / "out").glob("*.safetensors") for k, t in load_file(path).items()}
    assert found.keys() == expected.keys() - {"3.weight"}
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".partial" or path.name[0] == "."]
    assert shard.read_bytes() == whole


def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(tmp_path: Path) -> None:
    saved(tmp_path)
    shard = next((tmp_path / "root" / "data").glob("*/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[4100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptShardError, match="rank-00000"):
        exporting.export_hf(source(tmp_path), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_what_is_not_there_is_said_with_what_is(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ExportError, match="no tensors below 'net'; there are model"):
        source(tmp_path, "net")
    with pytest.raises(NoSuchStepError, match="committed steps: 7"):
        run(tmp_path / "root", 8, tmp_path / "out", "--format", "hf")
    assert run(tmp_path / "root", "newest", tmp_path / "out", "--format", "hf").exit_code == 2


class Counting(PosixStore):
    """Has the ends of shards waited for until so many are being read."""

    def __init__(self, root: Path, together: int) -> None:
        super().__init__(root)
        self.calls, self._together = 0, threading.Barrier(together)

    def read(self, key: str, begin: int, end: int) -> bytes:
        self.calls += 1
        self._together.wait(30)
        return super().read(key, begin, end)


def test_what_ranks_say_is_read_once_and_side_by_side(tmp_path: Path) -> None:
    saved(tmp_path)
    found = source(tmp_path)
    (record,) = found.manifest.shards
    store = Counting(tmp_path / "root", 4)
    tensors = exporting.Tensors(store, [replace(record, rank=rank) for rank in range(8)], found.layout, "model")
    for _ in range(2):
        tensors.check_plain(tensors.entries(None))
        assert tensors.about() == found.about()
    assert store.calls == 8


def test_a_folder_of_safetensors_is_made_without_torch(tmp_path: Path) -> None:
    saved(tmp_path)
    code = (
        "import sys; from dcpsvc.commandline.exporting import export_command as c; "
        f"c.main([{str(tmp_path / 'root')!r}, '7', {str(tmp_path / 'out')!r}, '--format', 'hf'], "
        "standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1] == "False", done.stderr
