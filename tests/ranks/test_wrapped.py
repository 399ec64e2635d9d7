"""R27 R30: tensors made of others on several ranks: replicas are compared, parts go back to the ranks that had them."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import dcpsvc
from tests.ranks.harness import die, raised_by, run_ranks, values
from tests.ranks.models import checkpointer, committed
from tests.unit.scaled import Coarse, Layer, here, inside, scaled

pytestmark = pytest.mark.timeout(200)

ROWS = {1: (12,), 2: (6, 6), 3: (4, 4, 4), 4: (3, 3, 3, 3)}


def sharded(rank, world, seed, placements=None):
    """A DTensor of 12 rows over all ranks, whose parts differ."""
    if world == 4 and placements:
        mesh = init_device_mesh("cpu", (2, 2))
        local = scaled(seed + rank % 2, rows=6)
    else:
        mesh, placements = init_device_mesh("cpu", (world,)), [Shard(0)]
        local = scaled(seed + rank, rows=ROWS[world][rank])
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size((12, 4)), stride=(4, 1))


def state_of(rank, world, kind, seed):
    if kind == "sharded":
        return {"model": Layer(sharded(rank, world, seed))}
    if kind == "hybrid":
        return {"model": Layer(sharded(rank, world, seed, [Replicate(), Shard(0)]))}
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6, bias=False))
    if kind == "sharded states":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        return {"model": model, "optim": Coarse(model.parameters())}
    return {"model": model, "optim": Coarse(model.parameters()), "frozen": Layer(scaled(seed))}


def train(state, steps):
    for number in range(steps):
        state["model"](torch.full((2, 4), 1.0 + number)).square().sum().backward()
        state["optim"].step()
        state["optim"].zero_grad()


def contents(state):
    found = {}
    for name in state.keys() & {"model", "frozen"}:
        for key, tensor in state[name].named_parameters():
            found[f"{name}.{key}"] = inside(tensor) if key == "weight" else here(tensor).tolist()
    if "optim" in state:
        found["optim"] = [
            [entries["step"].item(), inside(entries["mean"])] for entries in state["optim"].state.values()
        ]
    return found


def save_and_die(rank, world, root, kind):
    state = state_of(rank, world, kind, 1)
    if "optim" in state:
        torch.manual_seed(7)
        train(state, 3)
    with checkpointer(root, state, save_last=False) as ckpt:
        ckpt.save(3).wait()
        (root.parent / f"{rank}.json").write_text(json.dumps(contents(state)))
        dist.barrier() if dist.is_initialized() else None
        die()


def resume_it(rank, world, root, kind):
    state = state_of(rank, world, kind, 50)
    before = contents(state)
    with checkpointer(root, state, save_last=False) as ckpt:
        error = raised_by(ckpt.resume)
    return error, before, contents(state)


@pytest.mark.parametrize(
    ("kind", "world"), [("replicas", 0), ("replicas", 2), ("sharded", 2), ("hybrid", 4), ("sharded states", 2)]
)
def test_a_job_killed_after_a_commit_has_what_was_inside_again_on_every_rank(tmp_path, kind, world):
    root = tmp_path / "run"
    run_ranks(world, save_and_die, root, kind)
    saved = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(max(world, 1))]
    for (error, before, after), expected in zip(values(run_ranks(world, resume_it, root, kind)), saved, strict=True):
        assert error is None, error.trace
        assert after == expected != before


def test_replicas_load_on_another_number_of_ranks(tmp_path):
    root = tmp_path / "run"
    run_ranks(2, save_and_die, root, "replicas")
    for error, _, after in values(run_ranks(3, resume_it, root, "replicas")):
        assert error is None, error.trace
        assert after == json.loads((tmp_path / "0.json").read_text())


@pytest.mark.parametrize(("kind", "world"), [("sharded", 1), ("sharded", 3), ("sharded states", 3)])
def test_what_is_inside_sharded_ones_is_refused_on_another_mesh_with_the_reason_and_nothing_is_changed(
    tmp_path, kind, world
):
    root = tmp_path / "run"
    run_ranks(2, save_and_die, root, kind)
    for error, before, after in values(run_ranks(world, resume_it, root, kind)):
        assert error.type == "RestoreFailedError"
        assert "StructureMismatchError" in error.text
        assert "over 2 ranks" in error.text
        assert f"over {world} ranks" in error.text
        assert "only the same mesh can load it" in error.text
        assert after == before


def save_stages(rank, world, root):
    stage = dcpsvc.Part(nn.ModuleDict({str(rank): Layer(scaled(rank))}))
    with checkpointer(root, {"model": stage}, save_last=False) as ckpt:
        ckpt.save(1).wait()


def load_whole(rank, world, root):
    model = nn.ModuleDict({str(number): Layer(scaled(50 + number)) for number in range(2)})
    with checkpointer(root, {"model": model}, save_last=False) as ckpt:
        ckpt.resume()
    return [inside(layer.weight) for layer in model.values()]


def test_stages_of_a_model_load_as_the_whole_model_on_one_rank(tmp_path):
    values(run_ranks(2, save_stages, tmp_path / "run"))
    assert values(run_ranks(0, load_whole, tmp_path / "run")) == [[inside(scaled(0)), inside(scaled(1))]]


def save_different(rank, world, root, what):
    state = {"frozen": Layer(scaled(1, note=f"of rank {rank}" if what == "context" else "rows"))}
    if what == "scale" and rank == 1:
        state["frozen"].weight.scale[2] *= 2

    def save():
        with checkpointer(root, state, save_last=False) as ckpt:
            ckpt.save(1).wait()

    return raised_by(save)


@pytest.mark.parametrize(("what", "key"), [("scale", "frozen.weight.scale"), ("context", "frozen.weight")])
def test_replicas_that_differ_inside_or_in_their_context_fail_the_save_by_key(tmp_path, what, key):
    for error in values(run_ranks(2, save_different, tmp_path / "run", what)):
        assert key in error.text
    assert committed(tmp_path / "run") == []
