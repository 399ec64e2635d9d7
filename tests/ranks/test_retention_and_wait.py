"""R13 R14, the wait at the end of a save, and saves that no schedule names."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch.distributed as dist

import dcpsvc
from dcpsvc import Every, Latest
from dcpsvc.format import manifest as manifests
from tests.ranks.harness import raised_by, run_ranks, values
from tests.ranks.models import Training, checkpointer, committed, files, flip_byte, step_files, truncate


def save_and_list(rank, world, root, steps, keep, resume_step=None):  # noqa: PLR0917
    training = Training("plain", rank)
    listings = []
    with checkpointer(root, training.state, keep=keep) as ckpt:
        start = ckpt.resume(resume_step)
        for step in steps:
            pending = ckpt.save(step)
            ckpt.wait()
            listings.append((pending.state, committed(root)))
            dist.barrier()
    return start, listings


def steps_of(folder):
    """Steps that have a file in a folder."""
    return sorted({int(name.split("step-")[1][:12]) for name in files(folder) if "step-" in name})


def test_latest_2_of_6_leaves_2_on_both_tiers_and_wait_returns_after_the_trimming(tmp_path):
    root = tmp_path / "run"
    results = values(run_ranks(2, save_and_list, root, range(1, 7), Latest(2)))

    for _, listings in results:
        assert listings == [("committed", list(range(max(1, step - 1), step + 1))) for step in range(1, 7)]
    assert steps_of(root) == steps_of(tmp_path / "local") == [5, 6]
    assert files(root / "tombstones") == []
    assert len(list((root / "data").iterdir())) == 2
    (run_id,) = (tmp_path / "local").iterdir()
    assert len(list((run_id / "data").iterdir())) == 2


@pytest.mark.parametrize(("named", "stay"), [(None, [3]), (2, [2, 3])], ids=["newest", "by name"])
def test_the_checkpoint_a_job_resumed_from_and_newer_ones_stay_while_it_runs(tmp_path, named, stay):
    root = tmp_path / "run"
    values(run_ranks(2, save_and_list, root, (1, 2, 3), dcpsvc.Everything()))
    results = values(run_ranks(2, save_and_list, root, (4, 5), Latest(1), named))

    assert results == [(stay[0], [("committed", [*stay, 4]), ("committed", [*stay, 5])])] * 2


@pytest.mark.parametrize("damage", [truncate, flip_byte])
def test_a_damaged_newer_commit_does_not_push_good_ones_out(tmp_path, damage):
    root, local = tmp_path / "run", tmp_path / "local"
    values(run_ranks(2, save_and_list, root, (1, 2, 3, 9), dcpsvc.Everything()))
    for folder in (root, local):
        for name in step_files(folder, 9):
            if name.endswith(".safetensors"):
                damage(folder / name)

    results = values(run_ranks(2, save_and_list, root, (4,), Latest(2)))

    assert [start for start, _ in results] == [3, 3]
    whole = [step for step in (1, 2, 3, 4) if step in committed(root)]
    assert whole[-2:] == [3, 4]
    values(run_ranks(2, save_and_list, root, (5,), Latest(2), 4))
    assert [step for step in committed(root) if step != 9] == [4, 5]


def rename_attempt(root, step, attempt):
    """Give a commit another attempt's name: which one sorts last among equal steps is chance otherwise."""
    (path,) = [root / name for name in files(root) if name.startswith("manifests/") and f".step-{step:012d}." in name]
    old = manifests.loads(f"manifests/{path.name}", path.read_bytes())
    shards = tuple(dataclasses.replace(s, path=s.path.replace(old.attempt, attempt)) for s in old.shards)
    new = dataclasses.replace(old, attempt=attempt, shards=shards)
    for folder in (root, *(Path(root).parent / "local").iterdir()):
        (folder / old.key.data).rename(folder / new.key.data)
        (folder / old.key.manifest).unlink()
        (folder / new.key.manifest).write_bytes(new.dumps())


@pytest.mark.parametrize("attempt", ["0-0", "zzzz-0"])
def test_a_step_saved_anew_after_damage_is_not_deleted_in_favour_of_the_damaged_one(tmp_path, attempt):
    root, local = tmp_path / "run", tmp_path / "local"
    values(run_ranks(2, save_and_list, root, (1, 2), dcpsvc.Everything()))
    rename_attempt(root, 2, attempt)
    for folder in (root, local):
        for name in step_files(folder, 2):
            if name.endswith(".safetensors"):
                flip_byte(folder / name)

    results = values(run_ranks(2, save_and_list, root, (2,), Latest(1)))
    assert [start for start, _ in results] == [1, 1]

    assert [start for start, _ in values(run_ranks(2, save_and_list, root, (), Latest(1)))] == [2, 2]
    state = {"trainer": {}}
    assert dcpsvc.load(root, state) == 2


# --- saves that no schedule names -----------------------------------------------------------------


def train_until(rank, world, root, every, steps, stop_at=None, stride=1):  # noqa: PLR0917
    """Steps of uneven length; which were saved, and where it stopped."""
    training = Training("plain", rank)
    saved, last = [], None
    with checkpointer(root, training.state, every=every) as ckpt:
        for step in range(stride, steps * stride + 1, stride):
            time.sleep(0.01 if rank == 0 else 0.02)
            if step == stop_at and rank == 1:
                ckpt.request_stop()
            outcome = ckpt.step(step)
            saved += [step] if outcome.saved else []
            if outcome.should_stop:
                last = step
                break
    return saved, last


def test_every_some_seconds_saves_the_same_steps_on_all_ranks(tmp_path):
    root = tmp_path / "run"
    results = values(run_ranks(2, train_until, root, Every(seconds=0.5), 250))

    assert results[0] == results[1]
    saved, _ = results[0]
    assert len(saved) >= 2
    assert committed(root) == sorted({*saved, 250})


@pytest.mark.parametrize("stride", [1, 10])
def test_a_stop_asked_for_on_rank_1_stops_all_ranks_at_one_step_that_is_committed(tmp_path, stride):
    root = tmp_path / "run"
    results = values(run_ranks(2, train_until, root, None, 400, 20 * stride, stride))

    assert results[0] == results[1]
    saved, last = results[0]
    assert last is not None
    assert last < 400 * stride
    assert saved == [last]
    assert committed(root) == [last]


def close_in_a_hurry(rank, world, root):
    training = Training("plain", rank)
    ckpt = checkpointer(root, training.state, sync_timeout_s=3)
    if rank == 0:
        ckpt.save(1)
    waited = raised_by(ckpt.wait, 0.2)
    dist.barrier()
    return waited, raised_by(ckpt.close)


def test_wait_that_runs_out_of_time_names_the_step_and_close_raises_its_failure(tmp_path):
    alone, other = values(run_ranks(2, close_in_a_hurry, tmp_path / "run"))

    assert alone[0].type == "WaitTimeoutError"
    assert alone[0]["pending"] == ["step 1"]
    assert alone[1].type == "RanksMissingError"
    assert other == (None, None)
