"""Ranks go on training while what they write is copied: DDP with its replicas, and FSDP2."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.ranks.faults import Trap, rig
from tests.ranks.harness import die, raised_by, run_ranks, values
from tests.ranks.models import Training, checkpointer, committed

SYNC_S = 3.0
WIDTH = 320
"""Weights, and their moments, are large enough to be copied late: on two ranks each part of them, too."""


def train_while_it_copies(rank, world, root, kind, staging):
    """Each save is followed by steps at once; what the state was is remembered."""
    training = Training(kind, rank, width=WIDTH, depth=3)
    training.train(2)
    expected, late = {}, 0
    with checkpointer(root, training.state, staging=staging, save_last=False) as ckpt:
        for step in range(1, 6):
            expected[step] = training.fingerprint()
            pending = ckpt.save(step)
            late += not pending.staged.done()
            training.train(2)
        ckpt.wait(60)
        statistics = ckpt.statistics()
    return expected, late, (statistics.committed, statistics.failed)


def load(rank, world, root, kind, step):
    training = Training(kind, rank, seed=7, width=WIDTH, depth=3)
    training.train(1)
    with checkpointer(root, training.state, save_last=False) as ckpt:
        assert ckpt.resume(step) == step
    return training.fingerprint()


@pytest.mark.parametrize("staging", ["overlap", "block"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_every_checkpoint_is_the_state_at_its_save_whatever_training_does_next(tmp_path, kind, staging):
    found = values(run_ranks(2, train_while_it_copies, tmp_path / "run", kind, staging))
    assert [counts for _, _, counts in found] == [(5, 0)] * 2
    if staging == "block":
        assert [late for _, late, _ in found] == [0, 0]
    assert committed(tmp_path / "run") == [1, 2, 3, 4, 5]
    for step in (1, 3, 5):
        loaded = values(run_ranks(2, load, tmp_path / "run", kind, step))
        assert loaded == [expected[step] for expected, _, _ in found]


def change_behind_the_optimizer(rank, world, root, kind):
    """On one rank a tensor is written to that only its optimizer should change, before the copy has come to it."""
    training = Training(kind, rank, width=WIDTH, depth=3)
    training.train(2)
    errors = []
    with checkpointer(root, training.state, save_last=False) as ckpt:
        pause = threading.Event()
        if rank == 1:
            ckpt._saver._staging._copier.submit(pause.wait, 60)
        pending = ckpt.save(1)
        if rank == 1:
            with torch.no_grad():
                training.core.middle[0].weight.mul_(0.5)
            pause.set()
        error = pending.committed.exception(60)
        errors.append((type(error).__name__, str(error)))
        if rank == 1:
            with torch.no_grad():
                training.core.middle[0].weight.mul_(2.0)
        training.train(1)
        ckpt.save(2).wait(60)
    return errors


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_torn_snapshot_of_one_rank_is_everybodys_failure_and_never_published(tmp_path, kind):
    for ((name, text),) in values(run_ranks(2, change_behind_the_optimizer, tmp_path / "run", kind)):
        assert name == "SaveFailedError"
        assert "rank 1 failed in" in text
        assert "TornSnapshotError: " in text
        assert "no checkpoint is committed yet" in text
    assert committed(tmp_path / "run") == [2]


def save_diverged(rank, world, root):
    training = Training("ddp", rank, width=WIDTH, depth=3)
    training.train(1)
    with torch.no_grad():
        training.core.middle[1].weight[WIDTH - 1, WIDTH - 1] += 0.5 * rank
    with checkpointer(root, training.state, save_last=False) as ckpt:
        error = ckpt.save(1).committed.exception(60)
        ckpt._uploader.last_error = None
    return str(error)


def test_a_large_replica_that_differs_is_named_though_it_is_hashed_late(tmp_path):
    for text in values(run_ranks(2, save_diverged, tmp_path / "run")):
        assert "StateMismatchError: model.middle.1.weight is not the same on all ranks" in text
    assert committed(tmp_path / "run") == []


def die_while_replicas_are_compared(rank, world, place, victim, where):
    """The replicas differ, and a rank dies while all say what theirs are."""
    training = Training("ddp", rank, width=WIDTH, depth=3)
    with torch.no_grad():
        training.core.middle[1].weight[0, 0] += rank
    trap = Trap()
    ckpt = checkpointer(place / "run", training.state, local=place / "node", save_last=False, sync_timeout_s=SYNC_S)
    rig(ckpt, trap)
    if rank == victim:
        trap.set(where, die)
    error = ckpt.save(1).committed.exception(60)
    ckpt._uploader.last_error = None
    raised_by(ckpt.close)
    return str(error)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("where", ["before compare", "inside compare"])
def test_a_rank_that_dies_while_replicas_are_compared_leaves_a_manifest_on_no_tier(tmp_path, victim, where):
    outcomes = run_ranks(3, die_while_replicas_are_compared, tmp_path, victim, where)
    told = values([outcome for rank, outcome in enumerate(outcomes) if rank != victim])
    assert len(set(told)) == 1
    missing, said = f"ranks ({victim},) did not arrive in compare", "model.middle.1.weight is not the same on all"
    assert (said if where == "inside compare" and victim else missing) in told[0]
    assert not list(tmp_path.rglob("*.manifest.json"))
    assert not [path for path in tmp_path.rglob("manifests/*") if path.is_file()]
