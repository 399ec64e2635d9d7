"""R9: what a job of several ranks leaves as it is, or does not use, is told by one of them, however it is divided."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dcpsvc
from dcpsvc import Point
from tests.ranks.harness import run_ranks, values
from tests.ranks.models import checkpointer
from tests.ranks.test_logging import listen

WAYS = {"DDP": DistributedDataParallel, "FSDP2": fully_shard}


class Layers(nn.ModuleDict):
    def forward(self, x):
        for layer in self.values():
            x = layer(x)
        return x


def state_of(way, rank, last):
    torch.manual_seed(0)
    if way == "pipeline":
        stage = nn.ModuleDict({"first": nn.Linear(4, 4)} if rank == 0 else {last: nn.Linear(4, 4)})
        return {"model": dcpsvc.Part(stage)}
    model = WAYS[way](Layers({"first": nn.Linear(4, 4), last: nn.Linear(4, 4)}))
    return {"model": model, "optim": torch.optim.SGD(model.parameters(), lr=0.1)}


def save_it(rank, world, root, way):
    with checkpointer(root, state_of(way, rank, "last"), save_last=False) as ckpt:
        ckpt.save(1).wait()


def resume_it(rank, world, root, way, last):
    lines, details = listen(), []
    state = state_of(way, rank, last)

    def hear(event):
        if event.name == Point.RESUMED:
            details.append(event.detail)

    with checkpointer(root, state, save_last=False, on_event=hear) as ckpt:
        ckpt.resume(strict=False)
        resumed = lines.take("WARNING")
    dcpsvc.load(root, state, strict=False)
    return [text for _, text in resumed], [text for _, text in lines.take("WARNING")], details[0]


KEYS = [
    "model.last.bias unexpected", "model.last.weight unexpected", "model.other.bias missing",
    "model.other.weight missing", "optim.param_groups.0.last.bias unexpected",
    "optim.param_groups.0.last.weight unexpected", "optim.param_groups.0.other.bias missing",
    "optim.param_groups.0.other.weight missing",
]  # fmt: skip


def rows(warning):
    return [" ".join(line.split()[:2]) for line in warning.splitlines()[2:]]


@pytest.mark.parametrize("way", WAYS)
def test_a_renamed_layer_is_named_once_by_one_rank_and_in_the_event_of_each(tmp_path, way):
    root = tmp_path / "run"
    values(run_ranks(2, save_it, root, way))
    speaks, silent = values(run_ranks(2, resume_it, root, way, "other"))
    for heard in speaks[:2]:
        (warning,) = heard
        assert rows(warning) == KEYS
    assert silent[:2] == ([], [])
    for _, _, detail in (speaks, silent):
        assert "4 not in the checkpoint, so not loaded: model.other.bias, model.other.weight, " in detail
        assert "4 of the checkpoint not used: model.last.bias, model.last.weight, " in detail
    for resumed, loaded, detail in values(run_ranks(2, resume_it, root, way, "last")):
        assert (resumed, loaded) == ([], [])
        assert "not used" not in detail


def test_a_stage_of_a_pipeline_is_spoken_for_by_the_rank_that_has_it(tmp_path):
    root = tmp_path / "run"
    values(run_ranks(2, save_it, root, "pipeline"))
    first, last = values(run_ranks(2, resume_it, root, "pipeline", "other"))
    assert first[:2] == ([], [])
    assert [rows(warning) for heard in last[:2] for warning in heard] == [
        ["model.other.bias missing", "model.other.weight missing"]
    ] * 2
