"""R34: an adapter is loaded over its own base only, however the base is sharded here and was sharded there."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import dcpsvc
from tests.ranks.harness import raised_by, run_ranks, values
from tests.ranks.models import checkpointer

KINDS = ["DDP", "FSDP1", "FSDP2", "HSDP", "TP"]


class Adapted(nn.Module):
    """A base, of which 7 rows are divided by no number of ranks, and one factor that is trained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False)
        self.odd = nn.Parameter(torch.randn(7, 3))
        self.requires_grad_(requires_grad=False)
        self.factor = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.second(self.first(x)) + self.factor(x)


def trained(kind, change=None):
    """The model as each parallelism has it; ``change`` writes to its base before, on this rank."""
    model = Adapted()
    with torch.no_grad():
        if change == "swap":
            model.first.weight[[0, 6]] = model.first.weight[[6, 0]]
        elif change == "value":
            model.odd[6, 2] += 1e-6
    world = dist.get_world_size() if dist.is_initialized() else 1
    if kind == "DDP":
        return model, DistributedDataParallel(model, init_sync=False)
    if kind == "FSDP1":
        return (
            wrapped := FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        ), wrapped
    if kind == "TP":
        parallelize_module(
            model, init_device_mesh("cpu", (world,)), {"first": ColwiseParallel(), "second": RowwiseParallel()}
        )
    elif kind == "HSDP":
        fully_shard(model, mesh=init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicas", "shards")))
    elif kind == "FSDP2":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return model, model


def save_it(rank, world, root, kind):
    _, model = trained(kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with checkpointer(root, {"model": model, "optim": optimizer}, only="trainable", save_last=False) as ckpt:
        for step in (1, 2):
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()
            ckpt.save(step).wait()


def factor(model):
    weight = next(p for name, p in model.named_parameters() if name.endswith("factor.weight"))
    return (weight.to_local() if isinstance(weight, DTensor) else weight).flatten().tolist()


def load_it(rank, world, root, kind, *changes):
    """``changes``: what happened to the base; of one rank if there are two."""
    model, wrapped = trained(kind, changes[rank] if len(changes) > 1 else next(iter(changes), None))
    before = factor(model)
    with checkpointer(root, {"model": wrapped}, only="trainable", save_last=False) as ckpt:
        error = raised_by(ckpt.resume)
    return error, factor(model) == before


def recorded(root):
    return [dict(c.versions) for c in (dcpsvc.storage_reader(root, step).manifest for step in (1, 2))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_has_one_fingerprint_however_it_is_sharded(tmp_path, kind):
    world = 4 if kind == "HSDP" else 2
    values(run_ranks(world, save_it, tmp_path / "run", kind))
    values(run_ranks(2, save_it, tmp_path / "ddp", "DDP"))
    found, expected = recorded(tmp_path / "run"), recorded(tmp_path / "ddp")
    assert found[0]["base.model"] == found[1]["base.model"] == expected[0]["base.model"]
    assert found[0]["base.model"].startswith("unnamed ")


@pytest.mark.parametrize("change", ["swap", "value"])
@pytest.mark.parametrize("kind", KINDS)
def test_another_base_of_the_same_shapes_is_refused_on_every_rank_and_nothing_is_touched(tmp_path, kind, change):
    world = 4 if kind == "HSDP" else 2
    values(run_ranks(2, save_it, tmp_path / "run", "FSDP2"))
    for error, untouched in values(run_ranks(world, load_it, tmp_path / "run", kind, change)):
        assert error.type == "RestoreFailedError"
        assert "model.__base__" in error.text
        assert untouched


def test_a_rank_with_another_base_than_the_others_is_named(tmp_path):
    values(run_ranks(2, save_it, tmp_path / "run", "DDP"))
    for error, untouched in values(run_ranks(2, load_it, tmp_path / "run", "DDP", None, "value")):
        assert "on ranks (1,) another than on rank 0" in error.text
        assert untouched


@pytest.mark.parametrize("kind", ["FSDP1", "FSDP2", "TP"])
def test_the_same_base_sharded_otherwise_is_accepted(tmp_path, kind):
    values(run_ranks(2, save_it, tmp_path / "run", "DDP"))
    found = values(run_ranks(2, load_it, tmp_path / "run", kind))
    assert [error for error, _ in found] == [None, None]
    assert not all(untouched for _, untouched in found)  # under FSDP1 one rank may hold nothing of it


@pytest.mark.parametrize("kind", ["FSDP1", "FSDP2", "TP"])
def test_what_was_saved_sharded_is_loaded_over_the_same_base_in_one_process(tmp_path, kind):
    values(run_ranks(2, save_it, tmp_path / "run", kind))
    model = Adapted()
    before = factor(model)
    assert dcpsvc.load(tmp_path / "run", {"model": model}, only="trainable") == 2
    assert factor(model) != before


# --- its buffers --------------------------------------------------------------------------------------


class Buffered(Adapted):
    """In train mode: a table that stays, running statistics, and a mean that follows what this rank sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(6.0))
        self.inner = nn.Module()
        self.inner.register_buffer("mean", torch.zeros(6))
        self.norm = nn.BatchNorm1d(6).requires_grad_(requires_grad=False)

    def forward(self, x):
        self.inner.mean.lerp_(x.detach().mean(0), 0.1)
        return super().forward(self.norm(x - self.inner.mean + self.table))


def go_on(rank, world, root, kind, until):
    """Losses behind the step that was resumed."""
    torch.manual_seed(0)
    model = Buffered()
    wrapped = (
        DistributedDataParallel(model) if kind == "DDP" else fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    )
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    losses = []
    with checkpointer(root, {"model": wrapped, "optim": optimizer}, only="trainable", save_last=False) as ckpt:
        for step in range(ckpt.resume() + 1, until + 1):
            torch.manual_seed(100 * step + (rank if kind == "DDP" else 0))
            loss = wrapped(torch.randn(4, 6)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()).hex())
            if step in {3, until}:
                ckpt.save(step).wait()
    return losses


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_of_a_frozen_base_in_train_mode_what_forward_changes_is_stored_and_ranks_go_on_bit_for_bit(tmp_path, kind):
    whole = values(run_ranks(2, go_on, tmp_path / "straight", kind, 6))
    values(run_ranks(2, go_on, tmp_path / "run", kind, 3))
    after = values(run_ranks(2, go_on, tmp_path / "run", kind, 6))
    assert [losses[3:] for losses in whole] == after
    names = {name for name in dcpsvc.storage_reader(tmp_path / "run", 6).layout.names() if name.startswith("model.")}
    running = {f"model.norm.{name}" for name in ("num_batches_tracked", "running_mean", "running_var")}
    assert names == {"model.factor.weight", "model.inner.mean"} | running


def change_one(rank, world, root):
    """Each rank writes to another buffer."""
    model = Buffered()
    with checkpointer(root, {"model": model}, only="trainable", save_last=False) as ckpt:
        if not ckpt.resume():
            (model.inner.mean if rank == 0 else model.table).add_(1)
            ckpt.save(1).wait()
    return model.inner.mean.tolist(), model.table.tolist()


def test_of_buffers_that_are_not_the_same_everywhere_those_that_rank_0_has_changed_are_stored(tmp_path):
    values(run_ranks(2, change_one, tmp_path / "run"))
    names = dcpsvc.storage_reader(tmp_path / "run", 1).layout.names()
    assert {name for name in names if "norm" not in name} == {"model.factor.weight", "model.inner.mean"}
    assert values(run_ranks(2, change_one, tmp_path / "run")) == [([1.0] * 6, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])] * 2
