"""L10 and design 5: plain ``torch.distributed.checkpoint.load`` reads our checkpoints into any layout."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import dcpsvc
from dcpsvc.commandline.importing import import_command
from tests.ranks.harness import run_ranks, values
from tests.ranks.models import FEATURES, Training, checkpointer, flip_byte, step_files

WIDTH = 15


def save(rank, world, root, kind):
    training = Training(kind, rank, width=WIDTH)
    training.train(3)
    weight = training.core.first.weight
    moment = training.optimizer.state[weight]["exp_avg"]
    with checkpointer(root, training.state) as ckpt:
        ckpt.save(3).wait()
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (weight, moment)]
    return [tensor.tolist() for tensor in whole], training.trainer


def read(rank, world, root):
    """Into tensors sharded along the other dimension where there are ranks, and into plain ones."""
    state = {
        "model.first.weight": torch.zeros(WIDTH, FEATURES),
        "optim.state.first.weight.exp_avg": torch.zeros(WIDTH, FEATURES),
        "trainer.steps": -1,
        "trainer.history": [],
        "optim.param_groups": None,
    }
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (world,))
        for name in list(state)[:2]:
            state[name] = distribute_tensor(state[name], mesh, [Shard(1)])
    dcp.load(state, storage_reader=dcpsvc.storage_reader(root))
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    whole = [tensor.full_tensor() if dist.is_initialized() else tensor for tensor in tensors]
    return [tensor.tolist() for tensor in whole], {"steps": state["trainer.steps"], "history": state["trainer.history"]}


@pytest.mark.parametrize(("kind", "world"), [("fsdp", 3), ("ddp", 2), ("plain", 0)])
@pytest.mark.parametrize("readers", [0, 2])
def test_plain_dcp_load_reads_tensors_and_values_into_another_layout(tmp_path, kind, world, readers):
    root = tmp_path / "run"
    saved = values(run_ranks(world, save, root, kind))[0]

    assert values(run_ranks(readers, read, root)) == [saved] * max(readers, 1)


def test_plain_dcp_load_refuses_a_flipped_byte(tmp_path):
    root = tmp_path / "run"
    values(run_ranks(2, save, root, "ddp"))
    for name in step_files(root, 3):
        if name.endswith(".safetensors"):
            flip_byte(root / name)

    (outcome,) = run_ranks(0, read, root)

    assert outcome.raised is not None
    assert "do not match their checksum" in outcome.raised.trace


def save_stock(rank, world, directory):
    training = Training("fsdp", rank, width=WIDTH)
    training.train(2)
    dcp.save({"app": {"model": training.core.state_dict()}}, checkpoint_id=directory)
    return {name: tensor.full_tensor().tolist() for name, tensor in training.core.named_parameters()}


def load_taken(rank, world, root):
    training = Training("fsdp", rank, width=WIDTH)
    training.train(1)
    assert dcpsvc.load(root, {"model": training.state["model"]}) == 9
    return {name: tensor.full_tensor().tolist() for name, tensor in training.core.named_parameters()}


def test_a_stock_dcp_directory_of_fsdp2_is_taken_and_loaded_on_as_many_ranks_and_on_more(tmp_path):
    saved = values(run_ranks(2, save_stock, tmp_path / "stock"))[0]
    arguments = [str(tmp_path / "stock"), str(tmp_path / "run"), "9", "--prefix", "app.model"]
    assert CliRunner().invoke(import_command, arguments, catch_exceptions=False).exit_code == 0
    for world in (2, 3):
        assert values(run_ranks(world, load_taken, tmp_path / "run")) == [saved] * world
