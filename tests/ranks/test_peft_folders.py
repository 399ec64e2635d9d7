"""R34: a ready PEFT folder is part of each checkpoint, under the same laws as its shards."""

import importlib.util
import os
import time

import pytest
import torch
from click.testing import CliRunner

import dcpsvc
from dcpsvc.cli import cli
from dcpsvc.errors import ConfigError
from dcpsvc.format.digest import digest
from dcpsvc.ranks.exchange import Exchange
from dcpsvc.reading import open_root
from dcpsvc.stages import discover
from dcpsvc.storage.open import open_store
from dcpsvc.storage.posix import PosixStore
from tests.ranks.harness import die, die_at, raised_by, run_ranks, values
from tests.ranks.models import flip_byte

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="not installed: peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),  # between the two libraries
]

WIDE = 1200
"""So wide that ranks which hold the same cut a factor between rows."""


def adapter(width=6):
    """A layer of which PEFT trains two factors."""
    import peft

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(width, width))
    return peft.get_peft_model(model, peft.LoraConfig(r=width // 3, target_modules=["0"]))


class DeadlyStore(PosixStore):
    """A run root at which this process dies before, or after, a file with a certain end of its name is written."""

    def __init__(self, root, moment):
        super().__init__(root)
        self.moment = moment

    def create(self, key, data):
        return self._around(key, lambda: PosixStore.create(self, key, data))

    def put_file(self, key, path, *, progress=None):
        self._around(key, lambda: PosixStore.put_file(self, key, path, progress=progress))

    def _around(self, key, write):
        when, name = self.moment
        hit = name in key
        if hit and when == "before":
            die()
        result = write()
        if hit and when == "after":
            die()
        return result


def train(rank, world, root, steps, *, local=None, **how):
    """Every rank has a disk of its own; ``folder`` is what rank 0 asks for, ``moment`` when it dies."""
    width, moment, point = how.get("width", 6), how.get("moment"), how.get("point")
    model = adapter(width)
    state = {"model": model, "optim": torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)}
    store = DeadlyStore(root, moment) if moment and rank == 0 else root
    saved = {"model": model} if how.get("alone") else state
    with dcpsvc.Checkpointer(
        store, saved, local=local or root.parent / f"node-{rank}", only="trainable", keep=dcpsvc.Latest(2),
        save_last=False, adapter_folder=how.get("folder", "model") if rank == 0 else "model", sync_timeout_s=6,
        on_event=die_at(point) if point else None,
    ) as ckpt:  # fmt: skip
        start = ckpt.resume()
        for step in range(start + 1, steps + 1):
            state["optim"].zero_grad()
            model(torch.ones(2, width)).square().sum().backward()
            state["optim"].step()
            ckpt.save(step).wait()
    return start, {name: p.tolist() for name, p in model.named_parameters() if p.requires_grad}


def trained(rank, world, root, steps, how):
    return train(rank, world, root, steps, **how)


def named(root):
    """What the manifests of a run root say about folders, after a look whether it is so: by step, name and digest."""
    store = open_root(root)
    found = {}
    for attempt in discover.committed(store):
        manifest = discover.read_manifest(store, attempt)
        for file in manifest.adapter.files:
            data = store.get(file.path, max_nbytes=1 << 24)
            assert (len(data), digest(data)) == (file.nbytes, file.digest)
            found[manifest.step, file.path.rpartition("/")[2]] = file.digest
    return found


def stored(root):
    """The files of folders that are there, by step and name."""
    keys = [entry.key for entry in open_store(root).list("data/") if "/adapter/" in entry.key]
    return {(int(key.split("-")[1].split(".")[0]), key.rpartition("/")[2]) for key in keys}


def run(*arguments):
    return CliRunner().invoke(cli, [*map(str, arguments)])


FILES = ["adapter_config.json", "adapter_model.safetensors"]


def test_each_checkpoint_that_stays_names_its_folder_and_nothing_else_is_there(tmp_path):
    values(run_ranks(2, train, tmp_path / "root", 4))
    assert set(named(tmp_path / "root")) == {(step, name) for step in (3, 4) for name in FILES}
    assert stored(tmp_path / "root") == set(named(tmp_path / "root"))
    assert {path.name for path in tmp_path.glob("node-0/*/data/*/adapter/*")} == {*FILES}
    assert list(tmp_path.glob("node-1/*/data/*/adapter")) == []


def test_an_object_store_has_the_folders_too(tmp_path):
    train(0, 1, "memory://peft-folders", 3, local=tmp_path)
    assert stored("memory://peft-folders") == set(named("memory://peft-folders"))
    assert {step for step, _ in stored("memory://peft-folders")} == {2, 3}


@pytest.mark.parametrize(("world", "width"), [(2, 6), (3, WIDE)])
def test_pefts_own_loader_takes_what_ranks_with_disks_of_their_own_put_together(tmp_path, world, width):
    import peft

    how = {"width": width, "alone": True}
    (_, expected), *_ = values(run_ranks(world, trained, tmp_path / "root", 1, how))
    layout = dcpsvc.storage_reader(tmp_path / "root").layout
    assert {chunk.rank for one in layout.tensors.values() for chunk in one.chunks} == set(range(world))
    (folder,) = (tmp_path / "root" / "data").glob("*/adapter")
    loaded = peft.PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(width, width)), folder)
    assert {name: p.tolist() for name, p in loaded.named_parameters() if "lora" in name} == expected


# --- killed between its files and the manifest -------------------------------------------------------


WRITES = [
    *(("before", name) for name in FILES),
    ("after", FILES[1]),
    *((when, "manifests/order") for when in ("before", "after")),
]


@pytest.mark.parametrize(("when", "name"), WRITES)
def test_killed_around_any_write_no_manifest_names_a_folder_that_is_not_there_and_the_next_start_finishes_it(
    tmp_path, when, name
):
    root = tmp_path / "root"
    values(run_ranks(2, train, root, 1))
    first, _ = run_ranks(2, trained, root, 2, {"moment": (when, name)})
    assert first.signal == 9
    assert {step for step, _ in named(root)} == ({1, 2} if (name, when) == ("manifests/order", "after") else {1})
    assert [start for start, _ in values(run_ranks(2, train, root, 2))] == [2, 2]
    assert set(named(root)) == {(step, file) for step in (1, 2) for file in FILES}
    assert run("verify", root).exit_code == 0


@pytest.mark.parametrize("point", ["shard-written", "acked-local"])
def test_a_manifest_on_a_local_disk_names_no_folder_that_is_not_there(tmp_path, point):
    root = tmp_path / "root"
    values(run_ranks(2, train, root, 1))
    outcomes = run_ranks(2, trained, root, 2, {"point": point})
    assert 9 in {outcome.signal for outcome in outcomes}
    journals = list(tmp_path.glob("node-*/*/manifests/order-999999999997*"))
    folders = [path.name for path in tmp_path.glob("node-0/*/data/step-000000000002*/adapter/*")]
    assert point == "shard-written" or journals
    assert not journals or sorted(folders) == FILES
    values(run_ranks(2, train, root, 2))
    assert set(named(root)) == {(step, file) for step in (1, 2) for file in FILES}
    left = list(tmp_path.glob("node-*/*/data/step-000000000002*"))
    assert {path.name for path in left} == {path.name for path in (root / "data").glob("step-000000000002*")}


def test_without_the_disk_the_folder_was_on_the_upload_is_not_finished(tmp_path):
    root = tmp_path / "root"
    values(run_ranks(1, train, root, 1))
    run_ranks(1, trained, root, 2, {"point": "acked-local"})
    (file,) = tmp_path.glob("node-0/*/data/step-000000000002*/adapter/adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    ((start, _),) = values(run_ranks(1, train, root, 2))
    assert start == 1
    assert set(named(root)) == {(step, name) for step in (1, 2) for name in FILES}


# --- what ranks are told ------------------------------------------------------------------------------


def test_ranks_that_ask_for_other_folders_are_told_so(tmp_path):
    raised = [one.raised for one in run_ranks(2, trained, tmp_path / "root", 1, {"folder": None})]
    assert all(
        one.type == "SaveFailedError" and "adapter folder is not the same on all ranks" in one.text for one in raised
    )
    assert not any("PerRank" in one.text for one in raised)  # it is no state
    assert stored(tmp_path / "root") == set()


def save_beside_a_pipe(rank, world, root):
    """Rank 0's disk hangs in the first save: whoever opens a pipe to write waits until somebody reads it."""
    local = root.parent / f"node-{rank}"

    def block(event):
        if (rank, event.name, event.step) == (0, "shard-written", 1):
            (data,) = local.glob("*/data/step-000000000001*")
            (data / "adapter").mkdir()
            os.mkfifo(data / "adapter" / FILES[1])

    with dcpsvc.Checkpointer(
        root, {"model": adapter()}, local=local, adapter_folder="model", save_last=False, sync_timeout_s=6,
        on_event=block,
    ) as ckpt:  # fmt: skip
        error = raised_by(ckpt.save(1).wait)
        ckpt.save(2).wait()
    return error


def test_a_disk_that_hangs_is_named_by_its_rank_and_the_next_save_is_made(tmp_path):
    raised = values(run_ranks(2, save_beside_a_pipe, tmp_path / "root"))
    assert [one.type for one in raised] == ["SaveFailedError"] * 2
    assert all([failure["rank"] for failure in one["failures"]] == [0] for one in raised)
    assert all("this node's disk took longer than 3 s over the folder of adapters" in one.text for one in raised)
    assert set(named(tmp_path / "root")) == {(2, name) for name in FILES}


def save_beside_rot(rank, world, root):
    """The shard of rank 1 rots in the first save, when it is on the disk."""
    local = root.parent / f"node-{rank}"

    def rot(event):
        if (rank, event.name, event.step) == (1, "shard-written", 1):
            (shard,) = local.glob("*/data/step-000000000001*/*.safetensors")
            flip_byte(shard)

    with dcpsvc.Checkpointer(
        root, {"model": adapter(2 * WIDE)}, local=local, adapter_folder="model", only="trainable", save_last=False,
        sync_timeout_s=6, on_event=rot,
    ) as ckpt:  # fmt: skip
        error = raised_by(ckpt.save(1).wait)
        ckpt.save(2).wait()
    return error


def test_a_shard_that_is_not_as_it_was_written_is_named_by_its_rank_and_the_next_save_is_made(tmp_path):
    for raised in values(run_ranks(2, save_beside_rot, tmp_path / "root")):
        for failure in raised["failures"]:  # of the two ranks that know, whoever says it first
            named_here = "rank-00001.safetensors" if failure["rank"] == 1 else "rank 1 did not send what it has"
            assert (failure["phase"], failure["error"]) == ("adapter", "CorruptShardError")
            assert named_here in failure["text"]
    assert set(named(tmp_path / "root")) == {(2, name) for name in FILES}
    assert stored(tmp_path / "root") == set(named(tmp_path / "root"))


def save_beside_a_death(rank, world, root, victim):
    """The victim dies when the second save has come to send what it has of the adapter."""
    if rank == victim:
        dies, true = [False, True], Exchange.gather
        Exchange.gather = lambda *given: die() if dies.pop(0) else true(*given)
    ckpt = dcpsvc.Checkpointer(
        root, {"model": adapter()}, local=root.parent / f"node-{rank}", adapter_folder="model", save_last=False,
        sync_timeout_s=3,
    )  # fmt: skip
    ckpt.save(1).wait()
    began = time.monotonic()
    return raised_by(ckpt.save(2).wait), time.monotonic() - began


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_dies_sending_is_named_to_the_others_in_time_and_the_folder_before_stays(tmp_path, victim):
    outcomes = run_ranks(3, save_beside_a_death, tmp_path / "root", victim)
    assert outcomes[victim].signal == 9
    for error, waited_s in (outcome.value for outcome in outcomes if outcome.rank != victim):
        assert error.type == "RanksMissingError"
        assert list(error["missing"]) == [victim]
        assert waited_s < 3 * 3
    assert set(named(tmp_path / "root")) == stored(tmp_path / "root") == {(1, name) for name in FILES}


def save_plain(rank, world, root):
    state, local = {"model": torch.nn.Linear(2, 2)}, root.parent / f"node-{rank}"
    ckpt = dcpsvc.Checkpointer(root, state, local=local, adapter_folder="model", save_last=False)
    error = raised_by(ckpt.save(1).wait)
    raised_by(ckpt.close)  # it tells of the failure once more
    return error


def test_a_module_without_adapters_fails_the_save_on_every_rank_and_leaves_nothing(tmp_path):
    raised = values(run_ranks(2, save_plain, tmp_path / "root"))
    assert [one.type for one in raised] == ["SaveFailedError"] * 2
    assert all("model: has no adapters of PEFT; " in one.text and "--format" not in one.text for one in raised)
    assert list(tmp_path.glob("*/data/*/*")) == list(tmp_path.glob("*/*/data/*/*")) == []


def test_a_folder_of_what_is_no_module_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match="adapter_folder='optim': the state has no such module; there are: model"):
        dcpsvc.Checkpointer(tmp_path, {"model": torch.nn.Linear(2, 2)}, adapter_folder="optim")


# --- the tools ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with a folder in its checkpoints; not to be changed."""
    root = tmp_path_factory.mktemp("made") / "root"
    values(run_ranks(2, train, root, 2))
    return root


@pytest.fixture
def root(made, tmp_path):
    """A run of one's own."""
    assert run("cp", made, tmp_path / "root").exit_code == 0
    return tmp_path / "root"


def test_a_copy_has_the_folders_byte_for_byte(made, root):
    assert named(root) == named(made)
    assert set(named(root)) == stored(root) == {(step, name) for step in (1, 2) for name in FILES}


def test_a_listing_of_one_checkpoint_shows_the_files_of_its_folder(made):
    said = run("show", made, 2).output
    assert "adapter folder of model" in said
    assert all(name in said.replace("\n", "") for name in FILES)
    assert all(name in run("show", made, 2, "--json").output for name in FILES)


@pytest.mark.parametrize("how", ["flipped", "missing", "longer"])
def test_a_damaged_folder_is_named_by_verify_and_not_copied(root, tmp_path, how):
    (file,) = root.glob("data/step-000000000002*/adapter/adapter_model.safetensors")
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.unlink() if how == "missing" else file.write_bytes(data + b"x" * (how == "longer"))
    found = run("verify", root)
    assert found.exit_code != 0
    assert f"adapter/{file.name}" in found.output.replace("\n", "")
    assert run("cp", root, tmp_path / "copy", 2).exit_code != 0
    assert list((tmp_path / "copy").glob("manifests/order*")) == []


def test_a_checkpoint_that_lacks_a_file_of_its_folder_is_not_resumed_but_the_one_before_it(root, tmp_path):
    (file,) = root.glob("data/step-000000000002*/adapter/adapter_config.json")
    file.unlink()
    ((start, _),) = values(run_ranks(1, train, root, 2))
    assert start == 1


def test_gc_takes_what_no_manifest_names_in_a_folder_and_nothing_else(root):
    (folder,) = root.glob("data/step-000000000002*/adapter")
    (folder / "other").mkdir()
    (folder / "other" / "adapter_config.json").write_bytes(b"{}")
    before = named(root)
    found = run("gc", root, "--older-than", "0s")
    assert found.exit_code == 0, found.output
    assert not (folder / "other" / "adapter_config.json").exists()
    assert named(root) == before
    assert stored(root) == set(before)


def newest(root, step=2):
    store = open_root(root)
    return discover.read_manifest(store, [one for one in discover.committed(store) if one.step == step][-1])


def test_an_edit_of_the_optimizer_carries_the_folder_byte_for_byte(root):
    before = newest(root)
    found = run("edit", root, 2, "--set", "optim.param_groups.0.lr=0.01")
    assert found.exit_code == 0, found.output
    after = newest(root)
    assert after.attempt != before.attempt
    assert [file.digest for file in after.adapter.files] == [file.digest for file in before.adapter.files]
    assert run("verify", root).exit_code == 0


def test_an_edit_of_the_adapters_configuration_makes_the_folder_anew(root):
    before = newest(root)
    found = run("edit", root, 2, "--set", "model.peft..default.lora_alpha=64")
    assert found.exit_code == 0, found.output
    after = newest(root)
    assert after.adapter.files[0].digest != before.adapter.files[0].digest
    assert after.adapter.files[1].digest == before.adapter.files[1].digest
    assert b'"lora_alpha": 64' in (root / after.adapter.files[0].path).read_bytes()


def test_an_edit_that_drops_the_module_drops_its_folder_and_says_so(root):
    found = run("edit", root, 2, "--drop", "model")
    assert found.exit_code == 0, found.output
    assert "without the adapter folder, which was made of model" in found.output.replace("\n", " ")
    assert newest(root).adapter is None


def test_a_promoted_checkpoint_has_its_folder_in_the_other_run(root, tmp_path):
    before = newest(root)
    found = run("promote", root, 2, tmp_path / "other")
    assert found.exit_code == 0, found.output
    assert [file.digest for file in newest(tmp_path / "other").adapter.files] == [
        file.digest for file in before.adapter.files
    ]
    assert run("verify", tmp_path / "other").exit_code == 0
