"""R27 R31: quantized weights: plain parts as they are, and tensors made of others by what is inside them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

import dcpsvc
from dcpsvc import Cast, Checkpointer, PerRank, copying
from dcpsvc.cli import cli
from dcpsvc.commandline.exporting import export_command
from dcpsvc.errors import (
    ExportError,
    NoValidCheckpointError,
    RestoreFailedError,
    SaveFailedError,
    StateError,
    StateMismatchError,
    StructureMismatchError,
    UnsupportedStateError,
)
from dcpsvc.reading import open_root
from dcpsvc.state import fingerprint
from dcpsvc.storage.shards import VerifiedShard
from dcpsvc.tools import comparing, showing
from tests.unit.one_process import bits, resume, save
from tests.unit.scaled import COLUMNS, ROWS, Coarse, Layer, Scaled, inside, scaled

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SECONDS = 30


class Other(Scaled):
    """As large, and made of the same."""


def holding(**buffers: torch.Tensor) -> nn.Module:
    module = nn.Linear(2, 2)
    for name, tensor in buffers.items():
        module.register_buffer(name, tensor)
    return module


def names(folder: Path) -> list[str]:
    reader = dcpsvc.storage_reader(folder / "root")
    return reader.layout.names()


def refused(folder: Path, state: dict[str, Any], match: str, kind: type[Exception] = StructureMismatchError) -> None:
    with pytest.raises(RestoreFailedError, match=match) as caught:
        resume(folder, state)
    assert [failure.error for failure in caught.value.failures] == [kind.__name__]
    assert not caught.value.changed


def test_integers_with_scales_and_zero_points_come_back_bit_for_bit(tmp_path: Path) -> None:
    parts = {
        "numbers": torch.arange(-3, 3, dtype=torch.int8),
        "scale": torch.rand(6),
        "zero": torch.ones(6).to(torch.uint8),
    }
    save(tmp_path, {"model": holding(**parts)})
    fresh = holding(**{name: torch.zeros_like(tensor) for name, tensor in parts.items()})
    resume(tmp_path, {"model": fresh})
    assert {name: bits(fresh.get_buffer(name)) for name in parts} == {name: bits(t) for name, t in parts.items()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.ao has had its day
def test_a_quantized_tensor_of_torch_ao_is_refused_by_key_with_the_remedy(tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.qint8)
    with pytest.raises(UnsupportedStateError, match=r"model\.weights: .*int_repr\(\), scale and zero point"):
        save(tmp_path, {"model": holding(weights=quantized)})
    assert dcpsvc.list_checkpoints(tmp_path / "root") == []


# --- modules ----------------------------------------------------------------------------------------


def test_a_tensor_made_of_others_is_stored_as_those_and_comes_back_in_the_one_that_is_there(tmp_path: Path) -> None:
    save(tmp_path, {"model": Layer(scaled(1))})
    assert names(tmp_path) == ["model.bias", "model.weight.numbers", "model.weight.scale"]
    fresh = Layer(scaled(2))
    weight, numbers = fresh.weight, fresh.weight.numbers
    resume(tmp_path, {"model": fresh})
    assert inside(fresh.weight) == inside(scaled(1))
    assert fresh.weight is weight
    assert fresh.weight.numbers is numbers


def test_one_inside_another_comes_back(tmp_path: Path) -> None:
    def nested(seed: int) -> Any:
        return Scaled(torch.full((2, 3), seed, dtype=torch.int8), scaled(seed), "outer")

    save(tmp_path, {"model": Layer(nested(1))})
    assert names(tmp_path)[1:] == ["model.weight.numbers", "model.weight.scale.numbers", "model.weight.scale.scale"]
    fresh = Layer(nested(2))
    resume(tmp_path, {"model": fresh})
    assert inside(fresh.weight.scale) == inside(scaled(1))
    refused(tmp_path, {"model": Layer(Scaled(torch.zeros(2, 3, dtype=torch.int8), scaled(note="x")))}, r"weight +\w+")


def test_a_tied_one_is_stored_once_and_loaded_by_any_of_its_names(tmp_path: Path) -> None:
    def tied(seed: int) -> nn.Module:
        first = Layer(scaled(seed))
        second = Layer(scaled(seed))
        second.weight = first.weight
        return nn.Sequential(first, second)

    save(tmp_path, {"model": tied(1)})
    layout = dcpsvc.storage_reader(tmp_path / "root").layout
    assert layout.aliases == {f"model.1.weight.{name}": f"model.0.weight.{name}" for name in ("numbers", "scale")}
    fresh = tied(2)
    resume(tmp_path, {"model": fresh})
    assert inside(fresh[0].weight) == inside(scaled(1))
    apart = nn.Sequential(Layer(scaled(2)), Layer(scaled(3)))
    resume(tmp_path, {"model": apart})
    assert [inside(layer.weight) for layer in apart] == [inside(scaled(1))] * 2


def test_in_a_module_that_is_cast_what_is_inside_keeps_its_dtype(tmp_path: Path) -> None:
    save(tmp_path, {"model": Cast(Layer(scaled(1)), torch.bfloat16)})
    layout = dcpsvc.storage_reader(tmp_path / "root").layout
    assert {key: tensor.dtype for key, tensor in layout.tensors.items()} == {
        "model.bias": "BF16", "model.weight.numbers": "I8", "model.weight.scale": "F32",
    }  # fmt: skip
    fresh = Layer(scaled(2))
    resume(tmp_path, {"model": Cast(fresh, torch.bfloat16)})
    assert inside(fresh.weight) == inside(scaled(1))


MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "another class": (lambda: scaled(2, kind=Other), r"model\.weight +class +tests\.unit\.scaled\.Scaled +.*Other"),
    "another context": (lambda: scaled(2, note="columns"), r"model\.weight +context +\{'note': 'rows'\} +.*columns"),
    "another shape": (lambda: scaled(2, columns=5), r"model\.weight +shape +\[6, 4\] +\[6, 5\]"),
    "a plain tensor": (lambda: torch.zeros(ROWS, COLUMNS), r"model\.weight +kind +.*Scaled\(numbers, scale\).*float32"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_one_that_was_not_made_alike_is_refused_with_the_model_untouched(tmp_path: Path, case: str) -> None:
    make, match = MISFITS[case]
    save(tmp_path, {"model": Layer(scaled(1))})
    fresh = Layer(make())
    nn.init.ones_(fresh.bias)
    before = fresh.weight.tolist() if case == "a plain tensor" else inside(fresh.weight)
    refused(tmp_path, {"model": fresh}, match)
    assert fresh.bias.tolist() == [1.0] * ROWS
    assert before == (fresh.weight.tolist() if case == "a plain tensor" else inside(fresh.weight))


def test_a_plain_tensor_is_not_loaded_into_one_made_of_others(tmp_path: Path) -> None:
    save(tmp_path, {"model": Layer(torch.ones(ROWS, COLUMNS))})
    fresh = Layer(scaled(2))
    refused(tmp_path, {"model": fresh}, r"1 difference.*\n.*\n +model\.weight +kind +float32\[6, 4\] +.*Scaled")
    assert inside(fresh.weight) == inside(scaled(2))


def test_one_that_the_checkpoint_lacks_is_missing_unless_that_is_let_pass(tmp_path: Path) -> None:
    save(tmp_path, {"model": nn.ModuleDict({"old": Layer(scaled(1))})})
    fresh = nn.ModuleDict({"old": Layer(scaled(2)), "new": Layer(scaled(3))})
    refused(tmp_path, {"model": fresh}, r"model\.new\.weight +missing +- +.*Scaled")
    resume(tmp_path, {"model": fresh}, strict=False)
    assert [inside(layer.weight) for layer in fresh.values()] == [inside(scaled(1)), inside(scaled(3))]


def test_a_full_checkpoint_is_loaded_into_an_adapter_run_with_its_quantized_base(tmp_path: Path) -> None:
    save(tmp_path, {"model": Layer(scaled(1))})
    fresh = Layer(scaled(2))
    state, options = {"model": fresh}, {"local": tmp_path / "local", "save_last": False}
    with Checkpointer(tmp_path / "root", state, only="trainable", **options) as ckpt:
        ckpt.resume()
    assert inside(fresh.weight) == inside(scaled(1))


def test_what_is_skipped_is_left_as_it_is_and_what_is_renamed_is_found(tmp_path: Path) -> None:
    save(tmp_path, {"model": Layer(scaled(1))})
    fresh = Layer(scaled(2))
    resume(tmp_path, {"model": fresh}, skip=["model.weight"])
    assert inside(fresh.weight) == inside(scaled(2))
    resume(tmp_path, {"other": fresh}, rename={"model": "other"})
    assert inside(fresh.weight) == inside(scaled(1))


def test_one_on_the_meta_device_is_refused_because_nothing_is_made_of_names_in_files(tmp_path: Path) -> None:
    save(tmp_path, {"model": Layer(scaled(1))})
    meta = Scaled(torch.empty(ROWS, COLUMNS, dtype=torch.int8, device="meta"), torch.empty(ROWS, device="meta"), "rows")
    refused(tmp_path, {"model": Layer(meta)}, r"model\.weight: a Scaled on the meta device", StateMismatchError)


def test_a_name_that_something_inside_would_share_with_another_tensor_is_refused_by_key(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"values\.w\.scale: two tensors"):
        save(tmp_path, {"values": {"w": scaled(), "w.scale": torch.ones(2)}})


def test_a_tensor_that_its_class_does_not_tell_of_is_refused_by_key(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedStateError, match=r"model\.weight: .*keeps a tensor"):
        save(tmp_path, {"model": Layer(scaled(note=[torch.ones(1)]))})


def test_where_an_object_lies_in_memory_and_on_which_device_makes_no_difference(tmp_path: Path) -> None:
    class Option:
        pass

    save(tmp_path, {"model": Layer(scaled(1, note=[Option(), torch.device("cpu"), torch.float16, {1.5: (2, 3)}]))})
    fresh = Layer(scaled(2, note=[Option(), torch.device("cuda"), torch.float16, {1.5: (2, 3)}]))
    resume(tmp_path, {"model": fresh})
    assert inside(fresh.weight) == inside(scaled(1))


def test_a_flipped_bit_inside_one_is_found(tmp_path: Path) -> None:
    save(tmp_path, {"model": Layer(scaled(1))})
    for place in ("root", "local"):
        for shard in (tmp_path / place).rglob("*.safetensors"):
            data = bytearray(shard.read_bytes())
            at = data.index(bits(scaled(1).numbers))
            data[at] ^= 1
            shard.write_bytes(data)
    fresh = Layer(scaled(2))
    with pytest.raises((RestoreFailedError, NoValidCheckpointError), match="safetensors"):
        resume(tmp_path, {"model": fresh})
    assert inside(fresh.weight) == inside(scaled(2))


class Held(copying.Batch):
    """What an optimizer owns is copied when it may be."""

    free = threading.Event()

    def run(self) -> None:
        if self.owner is not None and threading.current_thread() is not threading.main_thread():
            assert self.free.wait(SECONDS)
        super().run()


def test_what_is_inside_is_watched_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "Batch", Held)
    layer = Layer(scaled(rows=400, columns=400), rows=400)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with Checkpointer(tmp_path / "root", {"model": layer, "optim": optimizer}, save_last=False) as ckpt:
        pending = ckpt.save(1)
        with torch.no_grad():
            layer.weight.numbers[0, 0] += 1
        Held.free.set()
        with pytest.raises(SaveFailedError, match=r"TornSnapshotError: model\.weight\.numbers"):
            pending.wait(SECONDS)
        ckpt.save(2).wait(SECONDS)


# --- values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [lambda value: value, PerRank], ids=["shared", "per rank"])
def test_values_made_of_others_come_back_in_those_that_are_there(
    tmp_path: Path, declared: Callable[[Any], Any]
) -> None:
    save(tmp_path, {"values": declared({"deep": [scaled(1), 3]}), "bare": declared(scaled(2))})
    fresh = {"values": declared({"deep": [there := scaled(3), 4]}), "bare": declared(bare := scaled(4))}
    resume(tmp_path, fresh)
    found = fresh["values"].value if isinstance(fresh["values"], PerRank) else fresh["values"]
    assert found["deep"][0] is there
    assert found["deep"][1] == 3
    assert [inside(there), inside(bare)] == [inside(scaled(1)), inside(scaled(2))]
    refused(tmp_path, {"values": declared({"deep": [5, 4]}), "bare": declared(scaled(4))}, r"values.* kind .*no tensor")
    refused(
        tmp_path,
        {"values": declared({"deep": [scaled(1)]}), "bare": declared(torch.ones(ROWS, COLUMNS))},
        "bare.* kind",
    )


# --- optimizers -------------------------------------------------------------------------------------


def trained(seed: int, steps: int, kind: Any = Coarse) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(COLUMNS, ROWS, bias=False)
    state = {"model": model, "optim": kind(model.parameters()), "rng": dcpsvc.Rng()}
    return train(state, steps)


def train(state: dict[str, Any], steps: int) -> dict[str, Any]:
    for _ in range(steps):
        state["model"](torch.randn(3, COLUMNS)).square().sum().backward()
        state["optim"].step()
        state["optim"].zero_grad()
    return state


def entries(state: dict[str, Any]) -> Any:
    (found,) = state["optim"].state.values()
    return found["step"].item(), inside(found["mean"]), state["model"].weight.tolist()


@pytest.mark.parametrize("steps", [0, 2])
def test_an_optimizer_goes_on_with_states_made_of_others_whether_or_not_it_has_begun(
    tmp_path: Path, steps: int
) -> None:
    state = trained(1, 3)
    save(tmp_path, state)
    train(state, 3)
    fresh = trained(2, steps)
    means = [kept["mean"] for kept in fresh["optim"].state.values()]
    resume(tmp_path, fresh)
    assert list(fresh["optim"].state[fresh["model"].weight]) == ["step", "mean"]
    assert all(fresh["optim"].state[fresh["model"].weight]["mean"] is mean for mean in means)
    assert entries(train(fresh, 3)) == entries(state)


def test_finding_out_what_an_optimizer_would_begin_with_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, trained(1, 3))
    fresh, calls = trained(2, 0), list[str]()
    fresh["optim"].register_step_pre_hook(lambda *_: calls.append("before"))
    fresh["optim"].note = "another"
    before = fresh["model"].weight.tolist(), torch.get_rng_state().tolist()
    refused(tmp_path, fresh, r"optim\.state\.weight\.mean +context +.*of an optimizer.*another")
    assert (fresh["model"].weight.tolist(), torch.get_rng_state().tolist()) == before
    assert not fresh["optim"].state
    assert not calls


class Counting(Coarse):
    """Keeps count of its steps beside its state, and its groups by another name."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.counts: dict[str, Any] = {"steps": [0], "seen": set(), "nested": ([[0]],)}
        self.mine = self.param_groups

    def step(self, closure: Any = None) -> None:
        assert self.mine is self.param_groups
        self.counts["steps"][0] += 1
        self.counts["nested"][0][0][0] += 1
        self.counts["seen"].add("step")
        self.counts["last"] = self.counts["steps"][0]
        super().step(closure)


def test_finding_out_does_not_count_where_an_optimizer_counts_beside_its_state(tmp_path: Path) -> None:
    save(tmp_path, trained(1, 3, Counting))
    fresh = trained(2, 0, Counting)
    resume(tmp_path, fresh)
    assert fresh["optim"].counts == {"steps": [0], "seen": set(), "nested": ([[0]],)}
    assert len(fresh["optim"].state) == 1


def test_states_of_another_kind_of_optimizer_are_refused_with_everything_untouched(tmp_path: Path) -> None:
    save(tmp_path, trained(1, 3))
    fresh = trained(2, 1, lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    before = fresh["model"].weight.tolist()
    refused(tmp_path, fresh, r"optim\.state\.weight\.mean +kind +.*Scaled.* no tensor")
    assert fresh["model"].weight.tolist() == before


def test_an_optimizer_that_cannot_be_asked_says_to_step_once_before(tmp_path: Path) -> None:
    class Shy(Coarse):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters)
            self.only = self

        def step(self, closure: Any = None) -> None:
            assert self.only is self, "nobody else may do this"
            super().step(closure)

    save(tmp_path, trained(1, 3))
    refused(
        tmp_path,
        trained(2, 0, Shy),
        r"optim\.state\.weight\.mean: .*call its step\(\) once before.*nobody else",
        StateMismatchError,
    )


def test_one_inside_a_list_of_an_optimizers_state_is_refused_by_key(tmp_path: Path) -> None:
    state = trained(1, 1)
    state["optim"].state[state["model"].weight]["more"] = [scaled()]
    with pytest.raises(UnsupportedStateError, match=r"optim\.state\.weight\.more\.0: "):
        save(tmp_path, state)


# --- what is made of a checkpoint -------------------------------------------------------------------


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(export_command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_exports_to_torch_and_dcp_give_what_is_inside_by_name(tmp_path: Path) -> None:
    save(tmp_path, {"model": Layer(scaled(1)), "values": {"w": scaled(2), "n": 3}}, step=7)
    assert run(tmp_path / "root", 7, tmp_path / "torch", "--format", "torch").exit_code == 0
    found = torch.load(tmp_path / "torch" / "model.pt", weights_only=True)
    assert sorted(found) == ["bias", "weight.numbers", "weight.scale"]
    assert found["weight.numbers"].tolist() == inside(scaled(1))["numbers"]
    assert run(tmp_path / "root", 7, tmp_path / "dcp", "--format", "dcp").exit_code == 0
    into: dict[str, Any] = {"values.w.scale": torch.zeros(ROWS), "values.n": 0}
    torch.distributed.checkpoint.load(into, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert into["values.w.scale"].tolist() == inside(scaled(2))["scale"]
    assert into["values.n"] == 3


@pytest.mark.parametrize("more", [(), ("--flat",)])
def test_what_is_written_down_of_them_is_no_value_for_others(tmp_path: Path, more: tuple[str, ...]) -> None:
    for step, note in ((7, "rows"), (8, "columns")):
        save(tmp_path, {"model": Layer(scaled(1, note=note)), "n": 3}, step=step)
    assert run(tmp_path / "root", 7, tmp_path / "dcp", "--format", "dcp", *more).exit_code == 0
    written = FileSystemReader(tmp_path / "dcp").read_metadata().state_dict_metadata
    told = dcpsvc.storage_reader(tmp_path / "root").read_metadata().state_dict_metadata
    assert "n" in written
    assert "n" in told
    assert not [name for name in [*written, *told] if "__inner__" in name]
    store = open_root(tmp_path / "root")
    sides = [comparing.Side(store, m, showing.layout_of(store, m)) for m in (showing.find(store, n) for n in (7, 8))]
    assert not [path for path, *_ in comparing.compare(*sides).plain if "__inner__" in path]


def test_what_is_written_down_of_them_goes_with_their_component_and_not_alone(tmp_path: Path) -> None:
    save(tmp_path, {"model": Layer(scaled(1)), "values": {"w": scaled(2)}}, step=7)
    edit = ["edit", str(tmp_path / "root"), "7", "--drop"]
    refusal = CliRunner().invoke(cli, [*edit, "__inner__"]).exception
    assert isinstance(refusal, StateError)
    assert "no such component; there are: model, values" in str(refusal)
    assert CliRunner().invoke(cli, [*edit, "model"], catch_exceptions=False).exit_code == 0
    store = open_root(tmp_path / "root")
    (record,) = showing.find(store, 7).shards
    assert list(VerifiedShard([store], record).documents()["__inner__@0"]) == ["values.w"]
    fresh = {"values": {"w": scaled(3)}}
    resume(tmp_path, fresh)
    assert inside(fresh["values"]["w"]) == inside(scaled(2))


def test_an_export_to_hf_is_refused_by_key_with_the_remedy(tmp_path: Path) -> None:
    save(tmp_path, {"model": Layer(scaled(1))}, step=7)
    with pytest.raises(ExportError, match=r"model\.weight: is made of others.*--format torch"):
        run(tmp_path / "root", 7, tmp_path / "hf", "--format", "hf")
    assert not (tmp_path / "hf").exists()


def test_a_frozen_base_of_such_wrappers_has_a_fingerprint_of_what_it_is_made_of() -> None:
    one, other = scaled(), scaled()
    other.scale = other.scale * 2
    found = [fingerprint.sums([("weights", tensor)], 0, None) for tensor in (one, scaled(), other)]
    assert found[0] == found[1] != found[2]


def test_a_frozen_base_that_was_written_to_inside_has_another_fingerprint_in_the_next_manifest(tmp_path: Path) -> None:
    layer = Layer(scaled(1))
    with Checkpointer(tmp_path / "root", {"model": layer}, only="trainable", save_last=False) as ckpt:
        ckpt.save(1).wait(SECONDS)
        layer.weight.numbers[0, 0] += 1
        ckpt.save(2).wait(SECONDS)
    bases = [dcpsvc.storage_reader(tmp_path / "root", step).manifest.versions["base.model"] for step in (1, 2)]
    assert len(set(bases)) == len(bases)


def test_a_nested_tensor_is_refused_by_key(tmp_path: Path) -> None:
    jagged: Any = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(UnsupportedStateError, match=r"values\.w: tensor layout torch\.jagged"):
        save(tmp_path, {"values": {"w": jagged}})
