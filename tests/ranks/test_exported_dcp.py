"""R33: a stock DCP directory made of a checkpoint is loaded by plain DCP on other ranks, sharded otherwise."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dcpsvc
from dcpsvc.commandline.exporting import export_command
from dcpsvc.conversion import export_dcp
from dcpsvc.errors import ExportError
from dcpsvc.reading import open_root
from tests.ranks.harness import run_ranks, values


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def saved(tmp_path, **more):
    state = {"model": model(), "counter": {"n": 1}} | more
    with dcpsvc.Checkpointer(tmp_path / "root", state, local=tmp_path / "local") as ckpt:
        ckpt.save(1).wait(30)
    return open_root(tmp_path / "root")


def load_it(rank, world, directory):
    sharded = model().bfloat16()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.zero_()
    state = get_model_state_dict(sharded)
    dcp.load(state, checkpoint_id=directory)
    return {name: tensor.full_tensor().float().flatten().tolist() for name, tensor in state.items()}


def test_plain_dcp_on_two_ranks_loads_the_modules_own_names_into_fsdp2(tmp_path):
    export_dcp(saved(tmp_path), 1, tmp_path / "out", component="model", dtype="BF16")
    expected = {name: t.bfloat16().float().flatten().tolist() for name, t in model().state_dict().items()}
    assert values(run_ranks(2, load_it, tmp_path / "out")) == [expected, expected]
    kinds = dcp.FileSystemReader(tmp_path / "out").read_metadata().state_dict_metadata
    assert {kind.properties.dtype for kind in kinds.values()} == {torch.bfloat16}


def test_a_component_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ExportError, match="no tensors below 'critic'"):
        export_dcp(saved(tmp_path), 1, tmp_path / "out", component="critic")
    assert not (tmp_path / "out").exists()


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def job(net):
    """With two groups, of which a schedule changes the rates."""
    groups = [{"params": net[0].parameters()}, {"params": net[1].parameters(), "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def train(net, optimizer, schedule, steps):
    """The same batches on every rank."""
    for step in range(steps):
        net(torch.full((2, 5), step + 1.0)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def loaded_as_torchtitan_does(rank, world, directory):
    net = fully_shard(model(), mesh=init_device_mesh("cpu", (world,)))
    optimizer, schedule = job(net)
    titan = {"optimizer": get_optimizer_state_dict(net, optimizer, options=FLAT), "lr_scheduler": schedule}
    state = get_model_state_dict(net) | titan
    dcp.load(state, checkpoint_id=directory)
    set_model_state_dict(net, {name: value for name, value in state.items() if name not in titan})
    set_optimizer_state_dict(net, optimizer, state["optimizer"], options=FLAT)
    moments = [optimizer.state[p]["exp_avg"].full_tensor().tolist() for p in net.parameters()]
    parameters = [p.full_tensor().tolist() for p in net.parameters()]
    return parameters, moments, [group["lr"] for group in optimizer.param_groups], schedule.last_epoch


def test_laid_out_flat_it_is_loaded_whole_in_the_way_of_torchtitan(tmp_path):
    net = model()
    optimizer, schedule = job(net)
    train(net, optimizer, schedule, 3)
    saved(tmp_path, model=net, optimizer=optimizer, lr_scheduler=schedule)
    asked = [str(tmp_path / "root"), "1", str(tmp_path / "out"), "--format", "dcp", "--flat"]
    assert CliRunner().invoke(export_command, asked).exit_code == 0
    parameters = [p.tolist() for p in net.parameters()]
    moments = [optimizer.state[p]["exp_avg"].tolist() for p in net.parameters()]
    expected = parameters, moments, [0.1 / 4, 0.01 / 4], 3
    assert values(run_ranks(2, loaded_as_torchtitan_does, tmp_path / "out")) == [expected, expected]
    names = dcp.FileSystemReader(tmp_path / "out").read_metadata().state_dict_metadata
    assert {"0.weight", "optimizer.state.0.weight.exp_avg", "optimizer.param_groups.0.weight.lr"} <= names.keys()
    assert not [
        name for name in names if name.startswith(("model.", "optimizer.param_groups.0.lr", "optimizer.shapes"))
    ]
