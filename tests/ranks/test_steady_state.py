"""While the structure of the state stays the same, the ranks tell each other next to nothing."""

from __future__ import annotations

import torch

from tests.ranks.harness import run_ranks, values
from tests.ranks.models import Training, checkpointer


def count_what_is_gathered(rank, world, root, kind):
    """The size of what this rank gives to each collective of ours, save by save."""
    training = Training(kind, rank, width=64, depth=3)
    training.train(2)
    said = []
    extra = torch.zeros(3)
    with checkpointer(root, training.state | {"extra": {"of": extra}}, save_last=False) as ckpt:
        group = ckpt._job.group
        gather = group.all_gather
        group.all_gather = lambda data: said[-1].append(len(data)) or gather(data)
        for step in range(1, 7):
            said.append([])
            if step == 4:
                ckpt.state["extra"]["more"] = torch.ones(5)
            if step == 5:
                del ckpt.state["extra"]["more"]
            ckpt.save(step).wait(60)
            training.train(1)
    return said


def test_an_unchanged_structure_costs_two_small_records_a_save_and_one_that_was_there_before_too(tmp_path):
    for said in values(run_ranks(2, count_what_is_gathered, tmp_path / "run", "fsdp")):
        layout_and_acks, acks = 4, 2
        assert [len(save) for save in said] == [layout_and_acks, acks, acks, layout_and_acks, acks, acks]
        assert all(sum(save) <= 1024 for save in (said[1], said[2], said[4], said[5]))
