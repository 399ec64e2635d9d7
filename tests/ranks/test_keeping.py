"""R11 R13 R15 R16 R21 with real ranks: metrics that come late, pins, leases, and a training that diverges."""

import math
import shutil
import threading

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

import dcpsvc
from dcpsvc import Best, Divergence, Latest
from dcpsvc.storage.posix import PosixStore
from tests.ranks.harness import raised_by, run_ranks, values
from tests.ranks.models import Training, checkpointer, committed, files

BOUND_S = 30.0


def steps_of(folder):
    """Steps that have a file in a folder."""
    return sorted({int(name.split("step-")[1][:12]) for name in files(folder) if "step-" in name})


# --- late metrics, pins ---------------------------------------------------------------------------


def save_and_evaluate(rank, world, root, evals, keep):
    """Each step is evaluated while its save is still under way; the ranks disagree, and rank 0 counts."""
    training = Training("plain", rank)
    with checkpointer(root, training.state, keep=keep) as ckpt:
        ckpt.resume()
        for step, value in evals.items():
            pending = ckpt.save(step, metrics={"loss": 1.0 + rank})
            promise = ckpt.record_metrics(step, {"eval": value + 100 * rank})
            pending.wait(BOUND_S)
            promise.result(BOUND_S)
            ckpt.wait(BOUND_S)
            dist.barrier()
        return raised_by(ckpt.record_metrics(999, {"eval": 0.0}).result, BOUND_S)


def test_metrics_of_an_evaluation_beside_the_save_decide_what_stays_on_both_tiers(tmp_path):
    root = tmp_path / "run"
    evals = {1: 3.0, 2: 2.0, 3: math.nan, 4: 2.5, 5: 2.4, 6: 9.0}
    results = values(run_ranks(2, save_and_evaluate, root, evals, Latest(1) | Best(2, "eval", mode="min")))

    assert committed(root) == [2, 5, 6]
    found = {c.step: c.metrics for c in dcpsvc.list_checkpoints(root)}
    assert found == {step: {"loss": 1.0, "eval": evals[step]} for step in (2, 5, 6)}
    assert [name.split("/")[0] for name in files(root) if name.startswith("metrics/")] == ["metrics"] * 3, "by one rank"
    assert steps_of(root / "metrics") == steps_of(root / "data") == [2, 5, 6]
    assert steps_of(tmp_path / "local") == [5, 6], "two of the newest, for a fast restart"
    assert results[0].type == "CheckpointGoneError"
    assert results[1] is None, "the other ranks leave it to rank 0"


def pin_and_go_on(rank, world, root):
    training = Training("plain", rank)
    told = []
    with checkpointer(root, training.state, keep=Latest(1)) as ckpt:
        for step in range(1, 6):
            ckpt.save(step).wait(BOUND_S)
            if step in {1, 2}:
                ckpt.pin(step, "figure 3").result(BOUND_S)
            if step == 4:
                ckpt.unpin(1).result(BOUND_S)
            ckpt.wait(BOUND_S)
            dist.barrier()
            told.append(committed(root))
            dist.barrier()
    return told


def test_a_pinned_checkpoint_stays_until_it_is_unpinned(tmp_path):
    told = values(run_ranks(2, pin_and_go_on, tmp_path / "run"))
    assert told[0] == told[1]
    assert told[0][:3] == [[1], [1, 2], [1, 2, 3]]
    assert told[0][-1] == [2, 5]


def test_a_root_that_was_moved_keeps_its_best_its_pins_and_its_metrics(tmp_path):
    root, moved = tmp_path / "run", tmp_path / "elsewhere" / "moved"
    keep = Latest(1) | Best(1, "eval", mode="max")
    with checkpointer(root, {"n": [1]}, keep=keep) as ckpt:
        for step, value in ((1, 0.9), (2, 0.1), (3, 0.2)):
            ckpt.save(step).wait(BOUND_S)
            ckpt.record_metrics(step, {"eval": value}).result(BOUND_S)
            ckpt.wait(BOUND_S)
        ckpt.pin(3).result(BOUND_S)
    assert committed(root) == [1, 3]
    moved.parent.mkdir()
    shutil.move(root, moved)
    shutil.rmtree(tmp_path / "local")
    with checkpointer(moved, {"n": [1]}, keep=keep, local=tmp_path / "local") as ckpt:
        assert ckpt.resume() == 3
        for step in (4, 5):
            ckpt.save(step).wait(BOUND_S)
            ckpt.wait(BOUND_S)
    with checkpointer(moved, {"n": [1]}, keep=keep, local=tmp_path / "local") as ckpt:
        assert ckpt.resume() == 5
        ckpt.save(6).wait(BOUND_S)
        ckpt.wait(BOUND_S)
    assert committed(moved) == [1, 3, 5, 6]


# --- being read -----------------------------------------------------------------------------------


class Interrupted(PosixStore):
    """A reader that is held up between the manifest and the data."""

    def __init__(self, root):
        super().__init__(root)
        self.reads, self.goes_on = threading.Event(), threading.Event()

    def read(self, key, begin, end):
        if key.startswith("data/"):
            self.reads.set()
            assert self.goes_on.wait(BOUND_S)
        return super().read(key, begin, end)


def refuses_writes(root):
    """A place below a file: nobody can write there, root neither."""
    (root / "file").touch()
    return root / "file" / "x"


@pytest.mark.parametrize("writable", [True, False], ids=["with a lease", "read-only"])
def test_a_checkpoint_that_another_job_reads_is_not_deleted_under_its_hands(tmp_path, writable):
    root, state, loaded = tmp_path / "run", {"n": [0]}, []
    with checkpointer(root, {"n": [7]}, keep=Latest(1)) as ckpt:
        ckpt.save(1).wait(BOUND_S)
        ckpt.wait(BOUND_S)
        store = Interrupted(root)
        if not writable:
            store.create_fleeting = PosixStore(refuses_writes(root)).create_fleeting
        reader = threading.Thread(target=lambda: loaded.append(dcpsvc.load(store, state)), daemon=True)
        reader.start()
        assert store.reads.wait(BOUND_S)
        for step in (2, 3):
            ckpt.save(step).wait(BOUND_S)
            ckpt.wait(BOUND_S)
        held = committed(root)
        store.goes_on.set()
        reader.join(BOUND_S)
        ckpt.save(4).wait(BOUND_S)
        ckpt.wait(BOUND_S)
    if writable:
        assert (held, loaded, state) == ([1, 3], [1], {"n": [7]})
    else:
        assert held == [3]
        assert loaded == [3], "what was deleted is not half loaded: another one is taken"
    assert committed(root) == [4]
    assert files(root / "pins") == []


class Meanwhile(DefaultLoadPlanner):
    """DCP's own planner; something else happens before the first tensor is read."""

    def __init__(self, work):
        super().__init__()
        self.work = work

    def resolve_tensor(self, read_item):
        self.work()
        return super().resolve_tensor(read_item)


def test_a_checkpoint_that_plain_dcp_reads_is_not_deleted_under_its_hands(tmp_path):
    root, state, told = tmp_path / "run", {"w": torch.zeros(1000), "n": 0}, []
    with checkpointer(root, {"w": torch.full((1000,), 7.0), "n": 5}, keep=Latest(1)) as ckpt:

        def save(*steps):
            for step in steps:
                ckpt.save(step).wait(BOUND_S)
                ckpt.wait(BOUND_S)
            told.append(committed(root))

        save(1)
        reader = dcpsvc.storage_reader(root)
        dcp.load(state, storage_reader=reader, planner=Meanwhile(lambda: save(2, 3)), no_dist=True)
        save(4)
    assert told == [[1], [1, 3], [4]]
    assert (state["w"].unique().tolist(), state["n"]) == ([7.0], 5)
    assert files(root / "pins") == []


def test_a_root_that_cannot_be_written_is_read_by_plain_dcp_without_a_lease(tmp_path):
    root, state = tmp_path / "run", {"w": torch.zeros(1000)}
    with checkpointer(root, {"w": torch.full((1000,), 7.0)}) as ckpt:
        ckpt.save(1).wait(BOUND_S)
    store = PosixStore(root)
    store.create_fleeting = PosixStore(refuses_writes(root)).create_fleeting
    dcp.load(state, storage_reader=dcpsvc.storage_reader(store), no_dist=True)
    assert state["w"].unique().tolist() == [7.0]
    assert files(root / "pins") == []


# --- divergence -----------------------------------------------------------------------------------


def train_until_it_diverges(rank, world, root, bad, steps):
    """Rank 0 sees NaN from step ``bad`` on; the others see it from the beginning, which says nothing."""
    training = Training("ddp", rank)
    with checkpointer(
        root, training.state, every=dcpsvc.Every(steps=5), keep=Latest(2), divergence=Divergence(stop=True)
    ) as ckpt:
        start = ckpt.resume()
        for step in range(start + 1, steps + 1):
            loss = training.step()
            told = math.nan if step >= bad or rank > 0 else loss
            if ckpt.step(step, metrics={"loss": told}).should_stop:
                break
    return start, step, ckpt.statistics().newest, ckpt.exit_code, "divergence" in ckpt.stop_reason


def test_a_job_that_diverges_stops_on_all_ranks_at_one_step_and_the_next_start_goes_on_from_before_it(tmp_path):
    root = tmp_path / "run"
    results = values(run_ranks(2, train_until_it_diverges, root, 23, 5000))
    assert results[0] == results[1]
    start, last, newest, *stopped = results[0]
    assert (start, newest) == (0, last)
    assert stopped == [75, True]
    assert 23 <= last < 5000
    tagged = {c.step: c.diverged for c in dcpsvc.list_checkpoints(root)}
    assert tagged[last]
    assert [step for step, diverged in tagged.items() if not diverged] == [15, 20], "the good ones are not pushed out"

    results = values(run_ranks(2, train_until_it_diverges, root, 10**6, 30))
    assert results == [(20, 30, 30, 0, False)] * 2
    assert dcpsvc.load(root, {"trainer": {}}) == 30
