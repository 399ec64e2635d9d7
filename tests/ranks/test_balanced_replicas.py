"""R29: where only some ranks hold a part alike, each of them writes an equal share of its bytes, and they are those."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import Replicate, distribute_module

import dcpsvc
from tests.ranks.harness import run_ranks, values
from tests.ranks.models import checkpointer

WIDTH = 512


class Model(nn.Module):
    """Nothing of it can be cut in four as it is: 2001 words, and rows that do not begin where elements are divided."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(2001, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2049), nn.Linear(2049, WIDTH)) for _ in range(2)
        )

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return x


def made(kind):
    torch.manual_seed(0)
    model = Model()
    if kind == "part":
        return model
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    options = {"device_id": torch.device("cpu"), "use_orig_params": True}
    match kind:
        case "HSDP":
            return fully_shard(model, mesh=mesh)
        case "replicated DTensors":
            return distribute_module(model, mesh["replica"], _replicated)
        case "HYBRID_SHARD":
            options |= {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_mesh": mesh}
        case "NO_SHARD":
            options |= {"sharding_strategy": ShardingStrategy.NO_SHARD}
    return FullyShardedDataParallel(model, **options)


def _replicated(name, module, mesh):
    for key, parameter in list(module.named_parameters(recurse=False)):
        whole = torch.distributed.tensor.distribute_tensor(parameter, mesh, [Replicate()])
        setattr(module, key, nn.Parameter(whole))


def save_twice(rank, world, root, kind):
    """As the seed made it, and with the optimizer's state."""
    model = made(kind)
    optimizer = torch.optim.AdamW(model.parameters())
    given = dcpsvc.Part(model, range(world)) if kind == "part" else model
    with checkpointer(root, {"model": given, "optim": optimizer}, save_last=False) as ckpt:
        ckpt.save(1).wait()
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
        ckpt.save(2).wait()
    return dist.get_world_size()


@pytest.mark.parametrize("kind", ["HSDP", "HYBRID_SHARD", "NO_SHARD", "part"])
def test_no_rank_that_holds_a_replica_writes_much_more_than_its_part(tmp_path, kind):
    (world, *_) = values(run_ranks(4, save_twice, tmp_path / "run", kind))
    written = dict.fromkeys(range(world), 0)
    for tensor in dcpsvc.storage_reader(tmp_path / "run").layout.tensors.values():
        for chunk in tensor.chunks:
            written[chunk.rank] += chunk.numel * 4
    assert max(written.values()) / (sum(written.values()) / world) <= 1.05

    torch.manual_seed(0)
    wanted, found = Model(), Model()
    assert dcpsvc.load(tmp_path / "run", {"model": found}, step=1) == 1
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), found.parameters(), strict=True))


def test_of_copies_that_several_meshes_have_the_ranks_of_one_write(tmp_path):
    values(run_ranks(4, save_twice, tmp_path / "run", "replicated DTensors"))
    layout = dcpsvc.storage_reader(tmp_path / "run").layout
    cut = [tensor for tensor in layout.tensors.values() if tensor.shape]  # counters are no DTensors
    assert {chunk.rank for tensor in cut for chunk in tensor.chunks} == {0, 2}
