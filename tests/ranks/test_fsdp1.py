"""FSDP1 beyond the matrix: who comes late, what is gathered, what is tied, and what is refused."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import dcpsvc
from tests.ranks.harness import raised_by, run_ranks, values
from tests.ranks.models import checkpointer


class Net(nn.Module):
    """Tied weights, a buffer, an extra state, and a layer that is left alone."""

    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.alone = nn.Linear(6, 6)
        self.register_buffer("scale", torch.ones(2))
        self.seen = 0

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        self.seen = state["seen"]

    def forward(self, x):
        return self.head(self.alone(self.mid(self.embed(x)))) * self.scale[0]


def wrapped(seed, *, original=True, frozen=False, **options):
    torch.manual_seed(seed)
    core = Net()
    if frozen:
        core.mid.requires_grad_(False)  # noqa: FBT003 - torch's
    options |= {"device_id": torch.device("cpu"), "use_orig_params": original}
    model = FullyShardedDataParallel(core, ignored_modules=[core.alone], **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return core, model, optimizer


def train(model, optimizer, begin, steps):
    losses = []
    for step in range(begin, begin + steps):
        x = torch.randint(7, (4,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()).hex())
    return losses


def save_and_go_on(rank, world, root, original):
    core, model, optimizer = wrapped(0, original=original)
    train(model, optimizer, 0, 3)
    core.seen = 3
    with checkpointer(root, {"model": model, "optim": optimizer}, save_last=False) as ckpt:
        pending = ckpt.save(3)
        losses = train(model, optimizer, 3, 3)  # copied meanwhile
        pending.wait()
    return losses


def resume_and_go_on(rank, world, root, original):
    core, model, optimizer = wrapped(1, original=original)
    with torch.no_grad():
        model(torch.zeros(1, dtype=torch.long))  # the root unit stays gathered
    with checkpointer(root, {"model": model, "optim": optimizer}, save_last=False) as ckpt:
        assert ckpt.resume() == 3
    with torch.no_grad():
        first = float(nn.functional.cross_entropy(model(torch.arange(4)), torch.arange(4))).hex()
    return first, train(model, optimizer, 3, 3), core.seen


def load_plain(rank, world, root):
    torch.manual_seed(2)
    core = Net()
    optimizer = torch.optim.Adam(core.parameters(), lr=0.01)
    dcpsvc.load(root, {"model": core, "optim": optimizer})
    first = float(nn.functional.cross_entropy(core(torch.arange(4)), torch.arange(4)).detach()).hex()
    return first, core.seen, core.head.weight is core.embed.weight, len(optimizer.state)


@pytest.mark.parametrize("original", [True, False])
def test_fsdp1_with_tied_weights_and_modules_left_alone_goes_on_bit_for_bit(tmp_path, original):
    root = tmp_path / "run"
    straight = values(run_ranks(2, save_and_go_on, root, original))
    resumed = values(run_ranks(2, resume_and_go_on, root, original))
    (plain,) = values(run_ranks(0, load_plain, root))

    assert [losses for _, losses, _ in resumed] == straight
    assert {seen for _, _, seen in resumed} == {3}
    assert {first for first, _, _ in resumed} == {plain[0]}
    assert plain[1:] == (3, True, 5)
    layout = dcpsvc.storage_reader(root).layout
    assert layout.aliases == {"model.head.weight": "model.embed.weight"}
    assert layout.tensors["model.embed.weight"].shape == (7, 6)


def save_alone(rank, world, root):
    _, model, optimizer = wrapped(0)
    train(model, optimizer, 0, 2)
    with checkpointer(root, {"model": model, "optim": optimizer}, save_last=False, sync_timeout_s=4.0) as ckpt:
        error = raised_by(ckpt.save(2).wait) if rank == 0 else None
        train(model, optimizer, 2, 1)  # the training group is whole: rank 0 has asked nothing of it
        ckpt.save(3).wait()
    return error and (error.type, error.text)


def test_a_rank_that_does_not_save_is_named_and_fsdp1_trains_on(tmp_path):
    error, _ = values(run_ranks(2, save_alone, tmp_path / "run"))
    assert error[0] == "RanksMissingError"
    assert "(1,)" in error[1]
    assert [found.step for found in dcpsvc.list_checkpoints(tmp_path / "run")] == [3]


def save_trained(rank, world, root):
    _, model, optimizer = wrapped(0, frozen=True)
    train(model, optimizer, 0, 2)
    with checkpointer(root, {"model": model, "optim": optimizer}, only="trainable", save_last=False) as ckpt:
        ckpt.save(2).wait()
    before = train(model, optimizer, 2, 2)
    _, model, optimizer = wrapped(0, frozen=True)
    with checkpointer(root, {"model": model, "optim": optimizer}, only="trainable", save_last=False) as ckpt:
        ckpt.resume()
    return before == train(model, optimizer, 2, 2)


def test_under_fsdp1_only_what_is_trained_is_saved_and_comes_back(tmp_path):
    assert values(run_ranks(2, save_trained, tmp_path / "run")) == [True, True]
    names = [name for name in dcpsvc.storage_reader(tmp_path / "run").layout.names() if name.startswith("model.")]
    assert names == [f"model.{n}" for n in ("alone.bias", "alone.weight", "embed.weight", "head.weight")]


def save_counters(rank, world, root):
    """Parameters whose counters differ, which one flat parameter cannot have."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(2):
        model.mid.bias.requires_grad_(step > 0)
        optimizer.zero_grad()
        model(torch.zeros(1, dtype=torch.long)).sum().backward()
        optimizer.step()
    with checkpointer(root, {"model": model, "optim": optimizer}, save_last=False) as ckpt:
        ckpt.save(1).wait()


def load_counters(rank, world, root, flat):
    _, model, optimizer = wrapped(0, original=not flat)
    error = raised_by(dcpsvc.load, root, {"model": model, "optim": optimizer})
    return error and error.text


def test_counters_that_differ_do_not_fit_into_one_flat_parameter_and_are_named(tmp_path):
    values(run_ranks(0, save_counters, tmp_path / "run"))
    assert values(run_ranks(2, load_counters, tmp_path / "run", "")) == [None, None]
    for text in values(run_ranks(2, load_counters, tmp_path / "run", "flat")):
        assert "optim.state.mid" in text
        assert "use_orig_params=True" in text


def refuse(rank, world, root):
    transposed = nn.Linear(4, 6)
    transposed.weight = nn.Parameter(torch.zeros(4, 6).t())
    options = {"device_id": torch.device("cpu"), "use_orig_params": True}
    found = [nn.Sequential(FullyShardedDataParallel(transposed, **options))]
    unknown = FullyShardedDataParallel(nn.Linear(4, 4), **options)
    del unknown._handle.flat_param._shard_param_infos  # as a later torch may have it
    found.append(nn.Sequential(unknown))
    return [raised_by(checkpointer, root, {"model": model}) for model in found]


def test_what_fsdp1_has_flattened_in_another_way_is_refused_by_name(tmp_path):
    for strided, unknown in values(run_ranks(2, refuse, tmp_path / "run")):
        assert {strided.type, unknown.type} == {"UnsupportedStateError"}
        assert {strided["key"], unknown["key"]} == {"model.0"}
        assert "not contiguous" in strided.text
        assert "_shard_param_infos" in unknown.text
        assert "fully_shard" in unknown.text
