"""R28 R29: who holds a value is declared, checked, and comes back to whom it belonged."""

import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import dcpsvc
from dcpsvc import OneRank, Part, PerGroup, PerRank, Replicated
from tests.ranks.harness import raised_by, run_ranks, values
from tests.ranks.models import checkpointer

# --- values -----------------------------------------------------------------------------------------


def own_group(rank):
    """Ranks 0 and 1, 2 and 3, ..."""
    return [rank // 2 * 2, rank // 2 * 2 + 1]


def declared(rank, mark):
    """Values that differ between ranks wherever they are declared to; ``mark`` tells saved from fresh."""
    number = mark + rank
    return {
        "own": PerRank({"t": torch.full((3,), float(number)), "n": number}),
        "own_tensor": PerRank(torch.full((2, 2), float(number))),
        "ours": PerGroup({"t": torch.full((4,), float(mark + rank // 2)), "n": mark + rank // 2}, own_group(rank)),
        "one": OneRank({"t": torch.full((5,), float(number)), "n": number}, 1),
        "same": Replicated({"t": torch.full((6,), float(mark)), "n": mark}),
        "plain": OneRank(mark + rank, 0),
    }


def looked_at(state):
    found = {}
    for name, declaration in state.items():
        value = declaration.value
        if isinstance(value, dict):
            found[name] = (value["n"], value["t"].tolist())
        else:
            found[name] = value.tolist() if isinstance(value, torch.Tensor) else value
    return found


def save_declared(rank, world, root):
    state = declared(rank, 100)
    with checkpointer(root, state) as ckpt:
        ckpt.save(1).wait()
    return looked_at(state)


def load_declared(rank, world, root):
    state = declared(rank, 0)
    before = looked_at(state)
    with checkpointer(root, state, save_last=False) as ckpt:
        ckpt.resume()
    return before, looked_at(state)


@pytest.mark.parametrize("world", [4, 2, 6])
def test_each_rank_gets_back_what_was_its_own_its_groups_or_its_alone(tmp_path, world):
    saved = values(run_ranks(4, save_declared, tmp_path / "run"))
    expected = [saved[rank % 4] for rank in range(world)]

    for rank, (before, after) in enumerate(values(run_ranks(world, load_declared, tmp_path / "run"))):
        for name in ("own", "own_tensor", "ours", "same"):
            assert after[name] == expected[rank][name], name
        assert after["one"] == (expected[1] if rank == 1 else before)["one"]
        assert after["plain"] == (expected[0] if rank == 0 else before)["plain"]


def load_from_another_rank(rank, world, root):
    state = {"one": OneRank({}, 0), "own": PerRank({})}
    dcpsvc.load(root, state)
    return {name: looked_at({name: value}).get(name) for name, value in state.items() if value.value}


def test_what_one_rank_had_is_given_to_the_rank_that_is_named_now(tmp_path):
    values(run_ranks(4, save_declared, tmp_path / "run"))
    for world in (0, 2):
        loaded = values(run_ranks(world, load_from_another_rank, tmp_path / "run"))
        assert loaded[0]["one"] == (101, [101.0] * 5)
        assert all("one" not in other for other in loaded[1:])


def load_own_as_shared(rank, world, root):
    state = {"own": {"n": 0, "t": torch.zeros(3)}}
    error = raised_by(dcpsvc.load, root, state)
    return error.text, state["own"]["n"]


def test_values_of_each_rank_are_never_loaded_as_one_that_all_share(tmp_path):
    values(run_ranks(4, save_declared, tmp_path / "run"))
    for text, untouched in values(run_ranks(2, load_own_as_shared, tmp_path / "run")):
        assert "own: saved as a value of each rank" in text
        assert "PerRank" in text
        assert untouched == 0


def declare_badly(rank, world):
    other = dist.new_group([1])
    errors = [
        raised_by(PerGroup, 1, [0]) if rank == 1 else raised_by(PerGroup, 1, other),
        raised_by(OneRank, 1, 2),
        raised_by(Replicated, 1, "bytes"),
        raised_by(Part, nn.Linear(1, 1), [world + 1]),
    ]
    return [(error.type, error.text) for error in errors]


def test_a_declaration_that_the_rank_contradicts_is_refused_where_it_is_made(tmp_path):
    for rank, found in enumerate(values(run_ranks(2, declare_badly))):
        assert {kind for kind, _ in found} == {"SharingError"}
        assert f"rank {rank} is not in the group" in found[0][1]
        assert "rank=2 is not in this job of 2 ranks" in found[1][1]
        assert "'hash', 'full' or 'off'" in found[2][1]
        assert f"rank {rank} is not in the group of ranks (3,)" in found[3][1]


def diverge(rank, world, root, wrap):
    """One weight of a bf16 model, or one moment of its optimizer, is another on rank 2."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8, dtype=torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    if rank == 2:
        with torch.no_grad():
            (model.weight if wrap == "weight" else optimizer.state[model.bias]["exp_avg"])[0] += 1
    state = {"model": Replicated(model), "optim": optimizer}
    with checkpointer(root, state, save_last=False, max_consecutive_failures=9) as ckpt:
        failed = raised_by(ckpt.save(1).wait)
        with torch.no_grad():
            (model.weight if wrap == "weight" else optimizer.state[model.bias]["exp_avg"]).zero_()
        ckpt.save(2).wait()
    return failed.type, failed.text


@pytest.mark.parametrize(("where", "key"), [("weight", "model.weight"), ("moment", "optim.state.bias.exp_avg")])
def test_a_diverged_replica_is_named_on_every_rank_and_nothing_is_published(tmp_path, where, key):
    for kind, text in values(run_ranks(3, diverge, tmp_path / "run", where)):
        assert kind == "SaveFailedError"
        assert key in text
        assert "(2,)" in text
    assert [found.step for found in dcpsvc.list_checkpoints(tmp_path / "run")] == [2]


def replicas(rank, kind):
    """State of which ranks 1 and 3 hold something alike, and the tensor that is that on this rank."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    if kind == "HSDP":
        model = fully_shard(model, mesh=mesh)
        return {"model": model}, model[0].weight.to_local()
    if kind == "FSDP2 x TP":  # each column shards the norm, which tensor parallelism has left alone
        parallelize_module(model, mesh["outer"], {"0": RowwiseParallel(input_layouts=Replicate())})
        fully_shard(model, mesh=mesh["inner"])
        return {"model": model}, model[1].weight.to_local()
    if kind == "FSDP1 hybrid":
        options = {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_mesh": mesh, "use_orig_params": True}
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)
        return {"model": model}, next(p for p in model.parameters() if p.numel())
    if kind == "DTensor":
        tensor = distribute_tensor(torch.ones(6, 4), mesh, [Replicate(), Shard(1)])
        return {"value": tensor}, tensor.to_local()
    if kind == "group":
        tensor = torch.ones(3)
        return {"value": PerGroup({"t": tensor}, [rank % 2, rank % 2 + 2])}, tensor
    for name in list(model._modules):
        if name != str(rank % 2):
            del model._modules[name]
    return {"model": Part(model, [rank % 2, rank % 2 + 2])}, next(model.parameters())


def diverge_in_a_group(rank, world, root, kind):
    state, held = replicas(rank, kind)
    with checkpointer(root, state, save_last=False, max_consecutive_failures=9) as ckpt:
        ckpt.save(1).wait()
        before = held.detach().clone()
        with torch.no_grad():
            held.view(-1)[-1:] += int(rank == 3)
        failed = raised_by(ckpt.save(2).wait)
        with torch.no_grad():
            held.copy_(before)
        ckpt.save(3).wait()
    return failed and (failed.type, failed.text)


@pytest.mark.parametrize("kind", ["HSDP", "FSDP2 x TP", "FSDP1 hybrid", "DTensor", "group", "part"])
def test_where_some_ranks_hold_the_same_one_that_diverged_is_named_on_every_rank(tmp_path, kind):
    for kind_of_error, text in values(run_ranks(4, diverge_in_a_group, tmp_path / "run", kind)):
        assert kind_of_error == "SaveFailedError"
        assert "is not the same on all ranks" in text
        assert "(1,)" in text
        assert "(3,)" in text
        assert "(0" not in text
        assert "; broadcast it, or Replicated(validate='off') if it may differ" in text
    assert [found.step for found in dcpsvc.list_checkpoints(tmp_path / "run")] == [1, 3]


def diverge_in_full(rank, world, root, where):
    torch.manual_seed(0)
    model = nn.Linear(3000, 2000, dtype=torch.bfloat16)  # 12 MB; more than is compared at once is below
    big = torch.zeros(5 << 20)
    state = {"model": Replicated(model, validate="full"), "big": Replicated(big, validate="full"), "n": rank * 0}
    with checkpointer(root, state, save_last=False, max_consecutive_failures=9) as ckpt:
        ckpt.save(1).wait()
        with torch.no_grad():
            if rank in where:
                big[4_500_000:] = 2.5
        failed = raised_by(ckpt.save(2).wait)
        big.zero_()
        ckpt.save(3).wait()
    return failed and (failed.type, failed.text)


@pytest.mark.parametrize(("where", "ranks"), [((2,), "(2,)"), ((0,), "(1, 2)")])
def test_compared_in_full_the_first_element_that_differs_is_named_on_every_rank(tmp_path, where, ranks):
    for kind, text in values(run_ranks(3, diverge_in_full, tmp_path / "run", where)):
        assert kind == "SaveFailedError"
        assert "big: not the same on all ranks: element 4500000 is " in text
        assert "2.5" in text
        assert f"ranks {ranks} differ from rank 0" in text
    assert [found.step for found in dcpsvc.list_checkpoints(tmp_path / "run")] == [1, 3]


def share_a_part(rank, world, root, group):
    def save():
        with checkpointer(root, {"model": Part(nn.Linear(2, 2), group)}, save_last=False) as ckpt:
            ckpt.save(1).wait()

    return raised_by(save)


def test_a_part_that_two_ranks_hold_needs_their_group(tmp_path):
    for error in values(run_ranks(2, share_a_part, tmp_path / "run", None)):
        assert error.type == "SaveFailedError"
        assert "model.bias: chunks hold 4 of 2 elements" in error.text
        assert "group" in error.text
    assert values(run_ranks(2, share_a_part, tmp_path / "run", [0, 1])) == [None, None]


# --- ZeRO: the optimizer's state is on one rank each ------------------------------------------------


def zero_training(kind, rank):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 2))
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    if kind == "zero":
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when imported, which is an error outside

        optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.Adam, lr=0.01)
    else:
        optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    return {"model": wrapped, "optim": optimizer, "sched": schedule}


def zero_steps(state, begin, steps):
    """The batch is the same on all ranks, so that any number of them trains alike."""
    losses = []
    for step in range(begin, begin + steps):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        state["optim"].zero_grad()
        loss = state["model"](x).square().mean()
        loss.backward()
        state["optim"].step()
        state["sched"].step()
        losses.append(float(loss).hex())
    return losses


def zero_straight(rank, world, kind):
    return zero_steps(zero_training(kind, rank), 0, 20)[10:]


def zero_save(rank, world, root, kind):
    state = zero_training(kind, rank)
    zero_steps(state, 0, 10)
    held = sum(t.numel() for s in getattr(state["optim"], "optim", state["optim"]).state.values() for t in s.values())
    with checkpointer(root, state) as ckpt:
        ckpt.save(10).wait()
    return held


def zero_resume(rank, world, root, kind):
    state = zero_training(kind, rank)
    zero_steps(state, 50, 2)
    with checkpointer(root, state, save_last=False) as ckpt:
        assert ckpt.resume() == 10
        return zero_steps(state, 10, 10)


@pytest.mark.parametrize(("saved", "resumed"), [(("zero", 2), ("zero", 2)), (("zero", 2), ("adam", 0))])
def test_a_sharded_optimizer_of_ddp_goes_on_bit_for_bit(tmp_path, saved, resumed):
    straight = values(run_ranks(saved[1], zero_straight, saved[0]))
    held = values(run_ranks(saved[1], zero_save, tmp_path / "run", saved[0]))
    assert sum(held) == 2 * 125 + 6  # the moments of all parameters and their counters, once
    for losses in values(run_ranks(resumed[1], zero_resume, tmp_path / "run", resumed[0])):
        assert losses == straight[0]


@pytest.mark.parametrize(("saved", "resumed"), [(("zero", 3), ("zero", 2)), (("adam", 2), ("zero", 2))])
def test_the_state_of_a_sharded_optimizer_moves_to_other_ranks_and_from_a_whole_one(tmp_path, saved, resumed):
    straight = values(run_ranks(resumed[1], zero_straight, resumed[0]))
    values(run_ranks(saved[1], zero_save, tmp_path / "run", saved[0]))
    for losses in values(run_ranks(resumed[1], zero_resume, tmp_path / "run", resumed[0])):
        if saved[1] == resumed[1]:
            assert losses == straight[0]
        else:  # the mean over three equal gradients rounds otherwise
            pairs = zip(losses, straight[0], strict=True)
            assert all(float.fromhex(a) == pytest.approx(float.fromhex(b), rel=1e-3) for a, b in pairs)


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def zero_consolidated(rank, world, root):
    """A rank has a copy of all state by now, and buckets that parameters are views of."""
    logging.getLogger("dcpsvc.state.optimunsaved").addHandler(heard := Heard())
    state = zero_training("zero", rank)
    with checkpointer(root, state) as ckpt:
        for number in (1, 2, 3):
            zero_steps(state, number, 1)
            state["optim"].consolidate_state_dict()
            ckpt.save(number).wait()
    return heard.texts


def test_what_a_sharded_optimizer_of_ddp_keeps_beside_its_state_is_not_told_of(tmp_path):
    assert values(run_ranks(2, zero_consolidated, tmp_path / "run")) == [[], []]
