"""R33: a stock DCP directory made of a checkpoint is loaded by plain DCP on other ranks, sharded otherwise."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dcpsvc
from dcpsvc.conversion import export_dcp
from dcpsvc.errors import ExportError
from dcpsvc.reading import open_root
from tests.ranks.harness import run_ranks, values


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def saved(tmp_path):
    state = {"model": model(), "counter": {"n": 1}}
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


def test_a_component_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ExportError, match="no tensors below 'critic'"):
        export_dcp(saved(tmp_path), 1, tmp_path / "out", component="critic")
    assert not (tmp_path / "out").exists()
