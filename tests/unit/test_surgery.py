"""Checkpoints made of others: changed values, dropped components, another run; and what is refused."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import dcpsvc
from dcpsvc import fence
from dcpsvc.cli import cli
from dcpsvc.errors import FencedError, StateError
from dcpsvc.format.epochs import Claim
from dcpsvc.format.keys import EPOCHS, Epoch
from dcpsvc.reading import open_root
from dcpsvc.stages import discover
from dcpsvc.storage.shards import VerifiedShard
from dcpsvc.tools import showing, surgery
from dcpsvc.tools.changes import Setting, changed, setting

if TYPE_CHECKING:
    from pathlib import Path


def training(seed: int = 0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, betas=(0.9, 0.99))
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def state(model, optimizer, **more):
    return {"model": model, "optim": optimizer, "note": "hello", "limit": float("inf"), "rng": dcpsvc.Rng(), **more}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Two steps of a run."""
    folder = tmp_path_factory.mktemp("run")
    with dcpsvc.Checkpointer(folder / "root", state(*training()), local=folder / "local") as ckpt:
        ckpt.save(10, metrics={"loss": 2.0}).wait(30)
        ckpt.save(20).wait(30)
    return folder / "root"


@pytest.fixture
def root(original, tmp_path) -> Path:
    shutil.copytree(original, tmp_path / "root")
    return tmp_path / "root"


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.stdout


def run_json(*arguments: object):
    return json.loads(run(*arguments, "--json"))


def refused(*arguments: object) -> str:
    command = [sys.executable, "-m", "dcpsvc", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode not in {0, 130}, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- edit -----------------------------------------------------------------------------------------


def test_a_job_resumes_the_changed_copy_and_nothing_else_has_changed(root, tmp_path):
    run("edit", root, 20, "--set", "optim.lr=1e-4", "--set", "note=changed", "--set", "optim.betas=[0.8, 0.95]")
    model, optimizer = training(seed=7)
    with dcpsvc.Checkpointer(root, state(model, optimizer), local=tmp_path / "local", save_last=False) as ckpt:
        assert ckpt.resume() == 20
        assert ckpt.state["note"] == "changed"
        assert ckpt.state["limit"] == float("inf")
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (1e-4, (0.8, 0.95), 1e-8)
    expected, moments = training()
    assert torch.equal(model.weight, expected.weight)
    assert torch.equal(optimizer.state[model.weight]["exp_avg_sq"], moments.state[expected.weight]["exp_avg_sq"])


def test_the_new_commit_stands_beside_the_old_and_says_where_it_comes_from(root):
    before = contents(root)
    made = run_json("edit", root, 10, "--set", "optim.lr=1e-4")
    assert made["changes"] == ["optim.param_groups.0.lr: 0.5 -> 0.0001"]
    assert made["newer"] == [20]
    after = contents(root)
    assert {name: after[name] for name in before} == before
    run("verify", root)
    store = open_root(root)
    inheritance = fence.newest_inheritance(store, store.list(EPOCHS))
    assert inheritance is not None
    assert (inheritance.epoch.number, len(inheritance.attempts)) == (2, 2)  # an older job commits nothing any more
    listed = [each for each in run_json("ls", root) if each["step"] == 10]
    assert [each["state"] for each in listed] == ["committed", "committed"]
    assert listed[1]["metrics"] == {"loss": 2.0}
    shown = run_json("show", root, 10)
    assert shown["attempt"] == made["attempt"]
    assert "from step 10" in shown["lineage"]
    assert "0.5 -> 0.0001" in run("show", root, 10)
    assert run_json("show", root, 10, "--attempt", listed[0]["attempt"])["lineage"] is None


def test_an_edit_of_an_edit_counts_too(root, tmp_path):
    run("edit", root, 20, "--set", "optim.lr=0.25")
    assert run_json("edit", root, 20, "--set", "optim.lr=0.125")["changes"] == [
        "optim.param_groups.0.lr: 0.25 -> 0.125"
    ]
    model, optimizer = training(seed=7)
    with dcpsvc.Checkpointer(root, state(model, optimizer), local=tmp_path / "local", save_last=False) as ckpt:
        ckpt.resume()
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_metrics_that_came_later_go_along_and_best_ranks_the_changed_copy_by_them(root, tmp_path):
    for value in (9.0, 0.5):
        dcpsvc.record_metrics(root, 10, {"eval": value})
    dcpsvc.record_metrics(root, 20, {"eval": 0.7})
    run("edit", root, 10, "--set", "note=changed")
    told = [each["metrics"] for each in run_json("ls", root)]
    assert told == [{"loss": 2.0, "eval": 0.5}, {"loss": 2.0, "eval": 0.5}, {"eval": 0.7}]
    run("promote", root, 10, tmp_path / "new")
    assert [each["metrics"] for each in run_json("ls", tmp_path / "new")] == [{"loss": 2.0, "eval": 0.5}]
    keep = dcpsvc.Latest(1) | dcpsvc.Best(1, "eval", mode="min")
    options = {"local": tmp_path / "local", "keep": keep, "save_last": False}
    with dcpsvc.Checkpointer(root, state(*training()), **options) as ckpt:
        ckpt.save(30).wait(30)
        ckpt.wait(30)
        assert [each.step for each in dcpsvc.list_checkpoints(root)] == [10, 10, 30]
        ckpt.record_metrics(10, {"eval": 0.8}).result(30)
        ckpt.save(40, metrics={"eval": 0.6}).wait(30)
        ckpt.wait(30)
    assert [each.step for each in dcpsvc.list_checkpoints(root)] == [40]


def test_a_copy_of_a_checkpoint_that_was_found_to_diverge_is_tagged_too(root):
    dcpsvc.record_metrics(root, 20, {"diverged": 1})
    run("edit", root, 20, "--set", "note=changed")
    newest = dcpsvc.latest(root)
    assert newest is not None
    assert newest.step == 10


def test_an_edit_of_a_pinned_step_stays_with_it_until_the_step_is_unpinned(root, tmp_path):
    run("pin", root, 10, "--note", "figure 3")
    made = run_json("edit", root, 10, "--set", "note=changed")
    run("promote", root, 10, tmp_path / "new")
    assert list((tmp_path / "new").glob("pins/*/*")) == [], "the pin says that it stays where it is"
    with dcpsvc.Checkpointer(
        root, state(*training()), local=tmp_path / "local", keep=dcpsvc.Latest(1), save_last=False
    ) as ckpt:
        ckpt.save(30).wait(30)
        ckpt.wait(30)
        listed = {each["attempt"]: each["reasons"] for each in run_json("ls", root) if each["step"] == 10}
        assert len(listed) == 2
        assert listed[made["attempt"]] == ["another attempt of step 10 stays"]
        ckpt.unpin(10).result(30)
        ckpt.save(40).wait(30)
        ckpt.wait(30)
    assert [each.step for each in dcpsvc.list_checkpoints(root)] == [40]


def test_a_dropped_component_takes_no_room_and_is_no_part_of_the_new_one(root):
    run("edit", root, 20, "--drop", "optim", "--drop", "rng")
    shown = run_json("show", root, 20)
    assert {name.partition(".")[0] for name in shown["tensors"]} == {"model"}
    assert shown["nbytes"] < next(each["nbytes"] for each in run_json("ls", root) if each["step"] == 10)
    model, optimizer = training(seed=7)
    values = {"model": model, "note": ""}
    assert dcpsvc.load(root, values) == 20
    assert values["note"] == "hello"
    assert torch.equal(model.weight, training()[0].weight)
    with pytest.raises(dcpsvc.RestoreError, match="optim"):
        dcpsvc.load(root, {"optim": optimizer, "model": model})


def test_the_new_shard_is_a_safetensors_file(root):
    run("edit", root, 20, "--drop", "optim")
    manifest = showing.find(open_root(root), 20)
    with safe_open(root / manifest.shards[0].path, "pt") as file:
        assert torch.equal(file.get_tensor("model.weight"), training()[0].weight)
        assert file.metadata()["attempt"] == manifest.attempt
        assert not [name for name in file.keys() if name.startswith("optim")]  # noqa: SIM118 - it is no dict


def test_what_would_be_changed_is_told_without_a_change(root):
    before = contents(root)
    assert run("edit", root, 20, "--set", "optim.lr=1", "--drop", "rng", "--dry-run").splitlines() == [
        "optim.param_groups.0.lr: 0.5 -> 1",
        "without rng",
    ]
    assert contents(root) == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--set", "optim.lrr=1"], "there is no 'lrr'; there are:"),
        (["--set", "optimizer.lr=1"], "there are: limit, model, note, optim, rng"),
        (["--set", "optim.lr=fast"], "of another kind"),
        (["--set", "optim.state.weight.exp_avg=1"], "is a tensor"),
        (["--set", "optim.lr.x=1"], "nothing lies below"),
        (["--set", "optim.param_groups.7.lr=1"], "a list of 1"),
        (["--set", "optim.amsgrad=1"], "of another kind"),
        (["--set", "limit=fast"], "is a number"),
        (["--drop", "nothing"], "no such component"),
        (["--drop", "optim", "--set", "optim.lr=1"], "to be dropped"),
        (["--set", "optim.lr"], "PATH=VALUE"),
        ([], "nothing to change"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(root, arguments, reason):
    before = contents(root)
    assert reason in refused("edit", root, 20, *arguments)
    assert contents(root) == before


def test_a_live_job_is_not_disturbed(root, tmp_path):
    with dcpsvc.Checkpointer(root, state(*training()), local=tmp_path / "local", save_last=False):
        before = contents(root)
        assert "live job" in refused("edit", root, 20, "--set", "optim.lr=1")
        assert contents(root) == before


def test_a_run_of_another_host_is_taken_over_only_if_that_is_said(root):
    def elsewhere(number: int) -> Claim:
        return Claim(epoch=Epoch(number, "0123abcd"), host=f"not-{socket.gethostname()}", pid=1, created="now")

    store = open_root(root)
    fence.inherit(store, fence.claim(store, elsewhere).epoch, discover.committed(store))
    before = contents(root)
    assert "--take-over" in refused("edit", root, 20, "--set", "optim.lr=1")
    assert contents(root) == before
    run("edit", root, 20, "--set", "optim.lr=1", "--take-over")


def test_a_job_that_was_replaced_by_an_edit_hears_of_it(root, tmp_path):
    """Not seen from here, as on another host: the epochs decide."""
    ckpt = dcpsvc.Checkpointer(root, state(*training()), local=tmp_path / "local", save_last=False)
    store = open_root(root)
    operation = surgery.Operation(source=store, manifest=showing.find(store, 20), settings=(Setting("optim.lr", 1),))
    surgery._commit(operation, operation.plan(), store, operation.manifest.run_id, lambda _: None)
    with pytest.raises(FencedError):
        ckpt.save(30).wait(30)
    with pytest.raises(FencedError):
        ckpt.close()
    assert [each.step for each in discover.committed(store)] == [10, 20, 20]


def test_an_edit_that_a_newer_job_overtakes_publishes_nothing(root):
    store = open_root(root)
    operation = surgery.Operation(source=store, manifest=showing.find(store, 20), settings=(Setting("optim.lr", 1),))
    overtaken = False

    def overtake(_: int) -> None:
        nonlocal overtaken
        if not overtaken:
            overtaken = True
            fence.claim(store, lambda number: Claim(epoch=Epoch(number, "0123abcd"), host="x", pid=1, created="now"))

    with pytest.raises(dcpsvc.RootError, match="has taken it over meanwhile; nothing was changed"):
        surgery.edit(operation, overtake)
    assert len(discover.committed(store)) == 2
    assert all(each.state == "committed" for each in dcpsvc.list_checkpoints(root))


def test_a_damaged_checkpoint_is_not_copied(root):
    shard = next((root / "data").glob("step-000000000020*/*"))
    data = bytearray(shard.read_bytes())
    data[4200] ^= 1
    shard.write_bytes(data)
    assert shard.name in refused("edit", root, 20, "--drop", "rng")
    assert len(discover.committed(open_root(root))) == 2


# --- promote --------------------------------------------------------------------------------------


def test_another_run_goes_on_from_a_promoted_checkpoint(root, tmp_path):
    made = run_json("promote", root, 10, tmp_path / "new", "--set", "optim.lr=0.25")
    assert made["run_id"] != run_json("show", root, 10)["run_id"]
    model, optimizer = training(seed=7)
    with dcpsvc.Checkpointer(tmp_path / "new", state(model, optimizer), local=tmp_path / "local") as ckpt:
        assert ckpt.resume() == 10
        ckpt.save(11).wait(30)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert [each["step"] for each in run_json("ls", tmp_path / "new")] == [10, 11]
    assert "the run" not in run_json("show", tmp_path / "new", 10)["lineage"]
    run("verify", tmp_path / "new")


def test_a_copy_without_changes_is_the_same_to_the_last_bit(root, tmp_path):
    run("promote", root, 20, tmp_path / "new")
    assert run_json("diff", root, 20, 20, "--root-b", tmp_path / "new", "--values")["same"]


def test_a_run_that_is_further_takes_no_older_checkpoint(root, tmp_path):
    run("promote", root, 20, tmp_path / "new")
    before = contents(tmp_path / "new")
    assert "has step 20 already" in refused("promote", root, 10, tmp_path / "new")
    assert "is the same run" in refused("promote", root, 10, root)
    assert contents(tmp_path / "new") == before


def test_no_torch_is_needed_to_operate(root, tmp_path):
    code = (
        "import sys\nfrom dcpsvc.cli import cli\n"
        f"cli.main(['promote', {str(root)!r}, '20', {str(tmp_path / 'new')!r}], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


# --- values ---------------------------------------------------------------------------------------


def test_numbers_that_json_lacks_can_be_set_and_unset():
    documents = {"a": {"x": {"$float": "inf"}, "y": 1.0}}
    assert changed(documents, [setting("a.x=2.5"), setting("a.y=NaN")])[0] == {"a": {"x": 2.5, "y": {"$float": "nan"}}}
    assert documents == {"a": {"x": {"$float": "inf"}, "y": 1.0}}


def test_each_rank_has_its_own_changed():
    documents = {"loader@0": {"epoch": 1}, "loader@1": {"epoch": 2}, "rng@0": {}}
    after, lines = changed(documents, [setting("loader.epoch=5")])
    assert after == {"loader@0": {"epoch": 5}, "loader@1": {"epoch": 5}, "rng@0": {}}
    assert lines == ["loader@0.epoch: 1 -> 5", "loader@1.epoch: 2 -> 5"]


def test_names_with_dots_are_found():
    assert changed({"a": {"b.c": {"d": 1}}}, [setting("a.b.c.d=2")])[0] == {"a": {"b.c": {"d": 2}}}


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), st.lists, max_leaves=5))
def test_a_value_set_to_what_it_is_changes_nothing(value):
    documents = {"a": {"b": value}}
    assert changed(documents, [Setting("a.b", value)])[0] == documents


def test_a_value_of_another_kind_is_refused():
    with pytest.raises(StateError, match="another kind"):
        changed({"a": "text"}, [setting("a=1")])


def test_the_bytes_of_a_large_tensor_go_through_in_pieces(tmp_path):
    value = torch.arange(9 << 20, dtype=torch.float32)  # more than one piece, and no whole number of blocks
    with dcpsvc.Checkpointer(tmp_path / "root", {"x": value, "y": 1}, local=tmp_path / "local") as ckpt:
        ckpt.save(1).wait(30)
    run("edit", tmp_path / "root", 1, "--set", "y=2")
    store = open_root(tmp_path / "root")
    VerifiedShard([store], showing.find(store, 1).shards[0]).verify()
    loaded = {"x": torch.zeros_like(value), "y": 0}
    dcpsvc.load(tmp_path / "root", loaded)
    assert torch.equal(loaded["x"], value)
    assert loaded["y"] == 2
