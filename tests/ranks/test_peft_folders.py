"""R34: each checkpoint of an adapter has a ready PEFT folder in it, whatever was killed between the two."""

import importlib.util
import json

import pytest
import torch
from click.testing import CliRunner

import dcpsvc
from dcpsvc.cli import cli
from dcpsvc.format.digest import digest
from dcpsvc.storage.open import open_store
from tests.ranks.harness import die_at, run_ranks, values

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="not installed: peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),  # between the two libraries
]


def adapter():
    """A layer of which PEFT trains two factors."""
    import peft

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6))
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))


def train(rank, world, root, steps, *points, local=None):
    from dcpsvc.integrations.peft import Folders

    folders = Folders(root, on_event=die_at(points[0]) if points else None)
    state, local = {"model": adapter()}, local or root.parent / "local"
    with dcpsvc.Checkpointer(
        root, state, local=local, only="trainable", on_event=folders, keep=dcpsvc.Latest(2), save_last=False
    ) as ckpt:
        start = ckpt.resume()
        for step in range(start + 1, steps + 1):
            ckpt.save(step).wait()
    return sorted(entry.key for entry in open_store(root).list("data/") if "/adapter/" in entry.key)


def steps_of(found):
    return sorted({int(key.split("-")[1].split(".")[0]) for key in found})


def test_each_checkpoint_that_stays_has_its_folder_and_its_bytes_are_those_it_says(tmp_path):
    (found, _) = values(run_ranks(2, train, tmp_path / "root", 4))
    assert steps_of(found) == [3, 4]
    for key in (key for key in found if key.endswith("files.json")):
        folder = (tmp_path / "root" / key).parent
        files = json.loads((folder / "files.json").read_bytes())["files"]
        assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors"]
        assert all(digest((folder / name).read_bytes()) == told["digest"] for name, told in files.items())


def test_pefts_own_loader_takes_the_folder(tmp_path):
    import peft

    values(run_ranks(1, train, tmp_path / "root", 1))
    (folder,) = (tmp_path / "root" / "data").glob("*/adapter")
    loaded = peft.PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(6, 6)), folder)
    expected = adapter().state_dict()
    here = {name: tensor for name, tensor in loaded.state_dict().items() if "lora" in name}
    assert here
    assert all(torch.equal(tensor, expected[name]) for name, tensor in here.items())


def test_killed_between_commit_and_folder_the_next_start_makes_it(tmp_path):
    (outcome,) = run_ranks(1, train, tmp_path / "root", 1, "committed")
    assert outcome.signal == 9
    assert list((tmp_path / "root" / "data").glob("*/adapter")) == []
    values(run_ranks(2, train, tmp_path / "root", 1))
    assert [path.name for path in (tmp_path / "root" / "data").glob("*/adapter/files.json")] == ["files.json"]


def test_a_folder_whose_checkpoint_was_deleted_meanwhile_goes_with_the_next_start(tmp_path):
    values(run_ranks(1, train, tmp_path / "root", 2))
    (newest,) = (path for path in (tmp_path / "root" / "data").iterdir() if path.name.startswith("step-000000000002"))
    gone = newest.with_name(newest.name.replace("step-000000000002", "step-000000000001").replace("-1", "-0") + "9")
    (gone / "adapter").mkdir(parents=True)
    (gone / "adapter" / "adapter_config.json").write_bytes(b"{}")
    values(run_ranks(1, train, tmp_path / "root", 3))
    assert not (gone / "adapter" / "adapter_config.json").exists()


def test_an_object_store_has_the_folders_too(tmp_path):
    found = train(0, 1, "memory://peft-folders", 3, local=tmp_path)
    assert steps_of(open_keys("memory://peft-folders")) == [2, 3]
    assert found == open_keys("memory://peft-folders")


def folder_of(root):
    values(run_ranks(1, train, root, 1))
    (folder,) = (root / "data").glob("*/adapter")
    return folder


def test_a_copy_has_the_folder_byte_for_byte(tmp_path):
    folder = folder_of(tmp_path / "root")
    result = CliRunner().invoke(cli, ["cp", str(tmp_path / "root"), str(tmp_path / "copy")])
    assert result.exit_code == 0, result.output
    copied = tmp_path / "copy" / folder.relative_to(tmp_path / "root")
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


@pytest.mark.parametrize("how", ["flipped", "missing", "list damaged"])
def test_a_damaged_folder_is_named_by_verify_and_not_copied(tmp_path, how):
    folder = folder_of(tmp_path / "root")
    file = folder / ("files.json" if how == "list damaged" else "adapter_model.safetensors")
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.unlink() if how == "missing" else file.write_bytes(data)
    found = CliRunner().invoke(cli, ["verify", str(tmp_path / "root")])
    assert found.exit_code != 0
    assert f"adapter/{file.name}" in found.output.replace("\n", "")
    copied = CliRunner().invoke(cli, ["cp", str(tmp_path / "root"), str(tmp_path / "copy")])
    assert copied.exit_code != 0
    assert list((tmp_path / "copy").glob("manifests/order*")) == []


def open_keys(root):
    return sorted(entry.key for entry in open_store(root).list("data/") if "/adapter/" in entry.key)
