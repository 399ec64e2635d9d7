"""``dcpsvc cp``: the same checkpoints in another place, every byte proven, from where training can go on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner

import dcpsvc
from dcpsvc.cli import cli
from dcpsvc.errors import CorruptShardError, DestinationError, RootError, StoreFullError
from dcpsvc.reading import open_root
from dcpsvc.stages import discover
from dcpsvc.storage.open import open_store
from dcpsvc.storage.posix import PosixStore
from dcpsvc.tools import mirroring

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with dcpsvc.Checkpointer(folder / "root", {"x": torch.arange(600_000.0)}, local=folder / "local") as ckpt:
        for step in (1, 2, 3):
            ckpt.state["x"] += 1
            ckpt.save(step, metrics={"loss": step / 2}).wait(30)
    dcpsvc.pin(folder / "root", 1, "figure 3")
    dcpsvc.record_metrics(folder / "root", 2, {"eval": 0.25})
    return folder / "root"


@pytest.fixture
def root(original, tmp_path) -> Path:
    shutil.copytree(original, tmp_path / "root")
    return tmp_path / "root"


def told(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.stdout


def told_json(*arguments: object):
    return json.loads(told(*arguments, "--json"))


def copied(source: Path, target, **more) -> list[mirroring.Copied]:
    store = open_root(source)
    manifests = [discover.read_manifest(store, attempt) for attempt in discover.committed(store)]
    return mirroring.copy(store, manifests, target, lambda _: None, **more)


def listed(where: object) -> list[dict[str, object]]:
    return told_json("ls", where)


@pytest.mark.parametrize("by_way_of", ["", "memory://{}"])
def test_all_checkpoints_with_what_lies_beside_them_verify_and_load_elsewhere(root, tmp_path, by_way_of):
    source, target = root, tmp_path / "copy"
    if by_way_of:
        source = by_way_of.format(uuid.uuid4().hex)
        assert "3 checkpoints" in told("cp", root, source)
    told("cp", source, target)
    assert listed(target) == listed(root)
    assert [one["reasons"] for one in listed(target)] == [["pinned: figure 3"], [], []]
    told("verify", target)
    state = {"x": torch.zeros(600_000)}
    assert dcpsvc.load(target, state, step=2) == 2
    assert torch.equal(state["x"], torch.arange(600_000.0) + 2)


def test_what_was_copied_is_told_by_step_and_attempt(root, tmp_path):
    (attempt,) = (one["attempt"] for one in listed(root) if one["step"] == 2)
    step, total = told("cp", root, tmp_path / "copy", 2).splitlines()
    assert step.startswith(f"step 2 (attempt {attempt}): 2.")
    assert total.startswith("1 checkpoint, 2.")


def test_only_the_steps_that_are_named(root, tmp_path):
    done = told_json("cp", root, tmp_path / "copy", 3, 1)
    assert [one["step"] for one in done] == [1, 3]
    assert [one["step"] for one in listed(tmp_path / "copy")] == [1, 3]


@pytest.mark.parametrize("remote", [False, True])
def test_what_broke_off_goes_on_where_it_was(root, remote):
    class Full(PosixStore):
        """To be written to as if it were far away, or not; full after so many shards."""

        room = 2

        @property
        def url(self) -> str:
            return f"far://{super().url}" if remote else super().url

        def put(self, key, data):
            if key.startswith("manifests/") and ".step-000000000002." in key:
                raise StoreFullError("put", key, "no space left")
            super().put(key, data)

    place = root.with_name("copy")
    with pytest.raises(StoreFullError):
        copied(root, Full(place))
    assert [one["step"] for one in listed(place)] == [1, 2]
    assert [one["state"] for one in listed(place)] == ["committed", "incomplete"]
    store = PosixStore(place)
    first, second, third = copied(root, store)
    assert (first.found_nbytes, third.found_nbytes) == (first.nbytes, 0)
    assert second.found_nbytes > 2_000_000, "its shard was there whole"
    assert listed(place) == listed(root)
    told("verify", place)


def test_a_mirror_is_brought_up_to_date_and_loses_nothing_that_its_source_deletes(root, tmp_path):
    target = tmp_path / "copy"
    told("cp", root, target)
    with dcpsvc.Checkpointer(root, {"x": torch.zeros(600_000)}, local=tmp_path / "l", save_last=False) as ckpt:
        ckpt.resume()
        ckpt.save(4).wait(30)
    told("gc", root, "--remove", 2, "--older-than", 0)
    dcpsvc.pin(root, 3)
    done = {one["step"]: one for one in told_json("cp", root, target)}
    assert done[1]["found_nbytes"] == done[1]["nbytes"]
    assert done[4]["found_nbytes"] == 0
    assert [one["step"] for one in listed(target)] == [1, 2, 3, 4]
    assert listed(target)[2]["reasons"] == ["pinned"]


def test_training_goes_on_in_the_copy_and_what_it_saves_counts(root, tmp_path):
    for number in range(2):  # two more starts: the copies' epochs are not the first ones
        with dcpsvc.Checkpointer(root, {"x": torch.zeros(600_000)}, local=tmp_path / "a", save_last=False) as ckpt:
            ckpt.resume()
            ckpt.save(4 + number).wait(30)
    target = tmp_path / "copy"
    told("cp", root, target)
    with dcpsvc.Checkpointer(target, {"x": torch.zeros(600_000)}, local=tmp_path / "b", save_last=False) as ckpt:
        assert ckpt.resume() == 5
        attempt = ckpt.save(6)
        attempt.wait(30)
    committed = discover.committed(open_root(target))
    assert [one.step for one in committed] == [1, 2, 3, 4, 5, 6]
    assert committed[-1].epoch > committed[-2].epoch


@pytest.mark.parametrize("command", ["cp", "fetch"])
def test_an_edit_of_a_copy_counts_before_what_was_copied(root, tmp_path, command):
    with dcpsvc.Checkpointer(root, {"x": torch.zeros(600_000), "lr": 0.5}, local=tmp_path / "a") as ckpt:
        ckpt.save(9).wait(30)
    target = tmp_path / "copy"
    told("cp", root, target, 9) if command == "cp" else told("fetch", root, 9, target)
    told("edit", target, 9, "--drop", "lr")
    state = {"x": torch.zeros(600_000)}
    assert dcpsvc.load(target, state) == 9, "the copy as it was has another component"
    assert "made" in told("show", target, 9)


def test_a_root_in_which_a_job_has_trained_is_added_to_only_when_asked_and_then_all_counts(root, tmp_path):
    target = tmp_path / "copy"
    told("cp", root, target, 1)
    with dcpsvc.Checkpointer(target, {"x": torch.zeros(600_000)}, local=tmp_path / "b", save_last=False) as ckpt:
        ckpt.resume()
        ckpt.save(7).wait(30)
    with pytest.raises(DestinationError, match="take-over"):
        copied(root, open_store(target))
    assert [one["step"] for one in listed(target)] == [1, 7]
    told("cp", root, target, "--take-over")
    assert [(one["step"], one["state"]) for one in listed(target)] == [(step, "committed") for step in (1, 2, 3, 7)]


def test_what_is_damaged_is_not_copied(root, tmp_path):
    shard = next((root / "data").glob("step-000000000002*/*"))
    data = bytearray(shard.read_bytes())
    data[500_000] ^= 1
    shard.write_bytes(data)
    for target in (PosixStore(tmp_path / "near"), open_store(f"memory://{uuid.uuid4().hex}")):
        with pytest.raises(CorruptShardError, match=shard.name):
            copied(root, target)
        assert [attempt.step for attempt in discover.committed(target)] == [1]


def test_a_checkpoint_that_is_deleted_meanwhile_is_left_out(root, tmp_path):
    store = open_root(root)
    manifests = [discover.read_manifest(store, attempt) for attempt in discover.committed(store)]
    told("gc", root, "--remove", 2, "--older-than", 0)
    done = mirroring.copy(store, manifests, open_store(tmp_path / "copy"), lambda _: None)
    assert [(one.step, one.gone) for one in done] == [(1, False), (2, True), (3, False)]
    assert [one["step"] for one in listed(tmp_path / "copy")] == [1, 3]


def test_the_wrong_place_is_refused_and_left_as_it_is(root, tmp_path):
    with dcpsvc.Checkpointer(tmp_path / "other", {"y": 1}, local=tmp_path / "l") as ckpt:
        ckpt.save(1).wait(30)
    for target in (tmp_path / "other", root):
        before = sorted(target.rglob("*"))
        command = [sys.executable, "-m", "dcpsvc", "cp", str(root), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, "Give another place" in done.stderr) == (3, True), done.stderr
        assert sorted(target.rglob("*")) == before
    with pytest.raises(RootError):
        copied(tmp_path / "nothing", open_store(tmp_path / "copy"))
