"""Saves that come faster than the store takes them: all ranks wait, skip or drop alike, in bounded memory and disk."""

import time
from pathlib import Path

import pytest
import torch.distributed as dist

import dcpsvc
from dcpsvc.errors import SaveSkippedError
from dcpsvc.storage.posix import PosixStore
from tests.ranks.harness import run_ranks, values
from tests.ranks.models import Training, checkpointer, committed, step_files

BOUND_S = 30.0


class Jammed(PosixStore):
    """Takes no shard until the file ``open`` appears beside it."""

    def put_file(self, key, path, *, progress=None):
        ends = time.monotonic() + BOUND_S
        while not Path(self.url).with_name("open").exists() and time.monotonic() < ends:
            time.sleep(0.01)
        super().put_file(key, path, progress=progress)


def save_in_a_row(rank, world, root, steps, options):
    """Save at each step while nothing gets through; let everything through; then what became of each."""
    training = Training("ddp", rank)
    with checkpointer(root, training.state, store=Jammed(root), **options) as ckpt:
        pending, local = [], []
        for step in range(1, steps + 1):
            training.step()
            outcome = ckpt.step(step)
            pending.append(outcome.pending)
            if outcome.saved and step == 1:
                pending[0].local.result(BOUND_S)  # its upload is under way, so it can be given up in good time
            local.append(len({Path(name).parent for name in local_shards(root)}))
        dist.barrier()
        root.with_name("open").touch()
        ckpt.wait(BOUND_S)
        arenas = len(ckpt._saves._saver._staging.arenas._arenas)
    return {
        "states": [each.state for each in pending],
        "skipped": ckpt.statistics().skipped,
        "failed": ckpt.statistics().failed,
        "attempts on disk": max(local),
        "arenas": arenas,
        "reasons": [str(each.committed.exception()) for each in pending if each.state == "skipped"],
    }


def local_shards(root):
    return [str(path) for path in root.with_name("local").rglob("*.safetensors")]


def test_skip_leaves_out_what_is_due_while_a_save_is_under_way_on_all_ranks_alike(tmp_path):
    root = tmp_path / "run"
    options = {"every": dcpsvc.Every(steps=1), "backpressure": "skip"}
    first, second = values(run_ranks(2, save_in_a_row, root, 5, options))

    assert first["states"] == second["states"] == ["committed"] + ["skipped"] * 4
    assert first["skipped"] == second["skipped"] == 4
    assert first["failed"] == 0
    assert all("under way" in reason for reason in first["reasons"])
    assert committed(root) == [1, 5], "the last step is never left out"


def test_drop_oldest_gives_the_oldest_up_on_all_ranks_and_its_files_go(tmp_path):
    root = tmp_path / "run"
    options = {"every": dcpsvc.Every(steps=1), "backpressure": "drop-oldest"}
    first, second = values(run_ranks(2, save_in_a_row, root, 6, options))

    assert first["states"] == second["states"] == ["skipped"] * 5 + ["committed"]
    assert first["skipped"] == 5
    assert first["failed"] == 0
    assert "given up for step 2" in first["reasons"][0]
    assert first["attempts on disk"] <= 2
    assert first["arenas"] <= 2
    assert committed(root) == [6]
    assert [step for step in range(1, 6) if step_files(root, step)] == []


def save_two_at_once(rank, world, root):
    training = Training("plain", rank)
    with checkpointer(root, training.state, store=Jammed(root), max_inflight=2) as ckpt:
        one, two = ckpt.save(1), ckpt.save(2)
        states = one.state, two.state
        dist.barrier()
        root.with_name("open").touch()
        three = ckpt.save(3)
        waited = one.state == "committed"
        three.wait(BOUND_S)
    return states, waited, [each.state for each in (one, two, three)]


def test_with_room_for_two_the_second_save_does_not_wait_and_the_third_does(tmp_path):
    root = tmp_path / "run"
    for states, waited, ended in values(run_ranks(2, save_two_at_once, root)):
        assert states == ("pending", "pending")
        assert waited
        assert ended == ["committed"] * 3
    assert committed(root) == [1, 2, 3]


def skip_then_save(rank, world, root):
    training = Training("plain", rank)
    with checkpointer(root, training.state, store=Jammed(root), backpressure="skip", save_last=False) as ckpt:
        ckpt.save(1)
        skipped = ckpt.save(2)
        with pytest.raises(SaveSkippedError, match="step 2"):
            skipped.wait(BOUND_S)
        dist.barrier()
        root.with_name("open").touch()
        ckpt.wait(BOUND_S)
        ckpt.save(2).wait(BOUND_S)
        return ckpt.statistics().consecutive_failures


def test_a_step_that_was_left_out_can_be_saved_later_and_counts_as_no_failure(tmp_path):
    root = tmp_path / "run"
    assert values(run_ranks(2, skip_then_save, root)) == [0, 0]
    assert committed(root) == [1, 2]
