"""One rank hangs, raises or dies with the store of the job: the others hear of it in time, and nothing good is lost."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dcpsvc
from dcpsvc import Point
from tests.ranks.harness import die_at, raised_by, run_ranks, values
from tests.ranks.models import Training, checkpointer, committed, files, step_files

BOUND_S = 30.0

# --- the process that hosts the store ---------------------------------------------------------------


def move_the_store_to_rank_0(rank, world):
    """As ``init_method="env://"`` without torchrun has it: the store dies with rank 0."""
    port = torch.zeros(1, dtype=torch.int64)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port[0] = store.port
    dist.broadcast(port, 0)
    if rank != 0:
        store = dist.TCPStore("127.0.0.1", int(port), is_master=False)
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


def lose_the_store(rank, world, root, point, step):
    """Rank 0 dies at a point of a step, and the store of the job with it."""
    move_the_store_to_rank_0(rank, world)
    training = Training("plain", rank)
    ckpt = checkpointer(root, training.state, on_event=die_at(point, step=step) if rank == 0 else None)
    errors = {number: raised_by(lambda n=number: ckpt.save(n).wait(BOUND_S)) for number in range(1, step + 1)}
    return {"error": errors[step], "earlier": [errors[n] for n in range(1, step)], "closing": raised_by(ckpt.close)}


def print_of(rank, world, root):
    training = Training("plain", rank, seed=1)
    with checkpointer(root, training.state, save_last=False) as ckpt:
        return ckpt.resume(), training.fingerprint() == Training("plain", rank).fingerprint()


@pytest.mark.parametrize("step", [1, 2])
def test_when_the_store_dies_right_after_the_commit_nothing_is_deleted_and_the_checkpoint_loads(tmp_path, step):
    root = tmp_path / "run"
    dead, *alive = run_ranks(3, lose_the_store, root, str(Point.MANIFEST_CREATED), step)

    assert dead.signal
    for result in values(alive):
        assert result["earlier"] == [None] * (step - 1)
        assert result["error"].type == "CommitUnknownError"
        assert result["error"]["step"] == step
        assert result["closing"].type == "CommitUnknownError"
    assert committed(root) == list(range(1, step + 1))
    assert len(step_files(root, step)) == 1 + 3
    assert len([name for name in step_files(tmp_path / "local", step) if name.endswith(".safetensors")]) == 3
    assert values(run_ranks(3, print_of, root)) == [(step, True)] * 3


@pytest.mark.parametrize("point", [Point.STAGED, Point.SHARD_WRITTEN, Point.UPLOADED])
def test_when_the_store_dies_before_the_commit_the_others_say_that_the_save_failed(tmp_path, point):
    root = tmp_path / "run"
    dead, *alive = run_ranks(3, lose_the_store, root, str(point), 2)

    assert dead.signal
    for result in values(alive):
        assert result["error"].type in {"SaveFailedError", "RanksMissingError"}
        assert result["closing"]
    assert committed(root) == [1]
    assert values(run_ranks(3, print_of, root)) == [(1, True)] * 3


# --- a rank that raises while it resumes ------------------------------------------------------------


class Loader:
    """Cannot say its state before its workers have started."""

    def __init__(self):
        self.broken = self.refuses = False

    def state_dict(self):
        if self.broken:
            raise LookupError("the workers have not started")
        return {"position": 1}

    def load_state_dict(self, state):
        if self.refuses:
            raise LookupError("the workers have not started")


def resume_with_a_broken_loader(rank, world, root, victim, how):
    loader = Loader()
    weight = torch.nn.Linear(2, 2)
    state = {"model": weight, "loader": dcpsvc.PerRank(loader)}
    # Nobody can be heard late: the harness ends the ranks before these deadlines do.
    ckpt = checkpointer(root, state, sync_timeout_s=600.0, upload_timeout_s=600.0, save_last=False)
    ckpt.save(1).wait(BOUND_S)
    if rank == victim:
        setattr(loader, how, True)
    raised = raised_by(ckpt.resume)
    setattr(loader, how, False)
    return {"raised": raised, "again": ckpt.resume(), "closing": raised_by(ckpt.close)}


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("how", ["broken", "refuses"])
def test_an_exception_in_one_ranks_object_during_resume_reaches_all_ranks_at_once(tmp_path, victim, how):
    root = tmp_path / "run"
    results = values(run_ranks(3, resume_with_a_broken_loader, root, victim, how, timeout_s=90))

    for result in results:
        raised = result["raised"]
        assert raised.type == "RestoreFailedError"
        assert [(f["rank"], f["error"]) for f in raised["failures"]] == [(victim, "LookupError")]
        assert raised["missing"] in ([], ())
        assert "the workers have not started" in raised.text
        assert ("partly changed" in raised.text) == (how == "refuses")
        assert (result["again"], result["closing"]) == (1, None)


# --- an upload that hangs ---------------------------------------------------------------------------


def hang_the_upload(local, rank, step):
    """An observer that puts a pipe in the place of this rank's finished shard: whoever opens it waits for ever."""

    def observe(event):
        if event.name == Point.ACKED_LOCAL and event.step == step:
            (shard,) = Path(local).glob(f"*/data/step-{step:012d}.*/rank-{rank:05d}.safetensors")
            shard.unlink()
            os.mkfifo(shard)

    return observe


def save_with_a_hung_upload(rank, world, root, victim):
    training = Training("plain", rank)
    local = root.parent / "local"
    ckpt = checkpointer(
        root,
        training.state,
        sync_timeout_s=10.0,
        upload_timeout_s=3.0,
        on_event=hang_the_upload(local, rank, 2) if rank == victim else None,
        save_last=False,
    )
    found = {}
    with ckpt:
        for step in (1, 2, 3):
            found[step] = raised_by(lambda n=step: ckpt.save(n).wait(BOUND_S))
            dist.barrier()
    return found


@pytest.mark.parametrize("victim", [0, 1])
def test_an_upload_that_hangs_on_one_rank_fails_on_all_ranks_and_the_next_save_is_committed(tmp_path, victim):
    root = tmp_path / "run"
    for found in values(run_ranks(2, save_with_a_hung_upload, root, victim)):
        assert found[1] is found[3] is None
        assert "SaveError" in found[2].family
        assert found[2].type in {"SaveFailedError", "RanksMissingError"}
        if found[2].type == "SaveFailedError":
            assert [(f["rank"], f["phase"], f["error"]) for f in found[2]["failures"]] == [
                (victim, "upload", "TimeoutError")
            ]
        else:
            assert list(found[2]["missing"]) == [victim]
    assert committed(root) == [1, 3]
    assert step_files(tmp_path / "local", 2) == []


# --- ranks that met without each other --------------------------------------------------------------


def join_after_a_failed_join(rank, world, root, alone):
    training = Training("plain", rank)
    with checkpointer(root, training.state, save_last=False) as ckpt:
        ckpt.save(1).wait(BOUND_S)
    before = (
        [raised_by(lambda: dcpsvc.load(root, training.state, sync_timeout_s=1.0)) for _ in range(2)]
        if (rank in alone)
        else []
    )
    dist.barrier()
    with checkpointer(root, training.state, save_last=False) as ckpt:
        resumed = ckpt.resume()
        ckpt.save(2).wait(BOUND_S)
    return [error and error.type for error in before], resumed, dcpsvc.load(root, training.state)


@pytest.mark.parametrize("alone", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_ranks_join_after_some_of_them_have_tried_without_the_others(tmp_path, alone):
    root = tmp_path / "run"
    for rank, (before, resumed, loaded) in enumerate(values(run_ranks(3, join_after_a_failed_join, root, alone))):
        assert before == (["RestoreFailedError"] * 2 if rank in alone else [])
        assert (resumed, loaded) == (1, 2)


# --- the local tier of a node -----------------------------------------------------------------------


def save_many(rank, world, root, keep_local):
    training = Training("ddp", rank)
    counts = []
    with checkpointer(root, training.state, keep_local=keep_local, save_last=False) as ckpt:
        for step in range(1, 6):
            ckpt.save(step).wait(BOUND_S)
            ckpt.wait(BOUND_S)
            dist.barrier()  # nobody trims while somebody counts
            local = root.parent / "local"
            counts.append(len([name for name in files(local) if name.endswith(f"rank-{rank:05d}.safetensors")]))
    return counts


@pytest.mark.parametrize("keep_local", [1, 2])
def test_each_rank_of_a_node_keeps_no_more_than_keep_local_attempts_of_its_own(tmp_path, keep_local):
    root = tmp_path / "run"
    counts = values(run_ranks(2, save_many, root, keep_local))
    assert counts == [[min(step, keep_local) for step in range(1, 6)]] * 2
    assert committed(root) == [1, 2, 3, 4, 5]
    assert len(step_files(tmp_path / "local", 5)) == 1 + 2
