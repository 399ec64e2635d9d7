"""R5 R6 R7 R8 R15: only a valid manifest makes a checkpoint, and only proven bytes are loaded."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

import dcpsvc
from dcpsvc import Point
from tests.ranks.harness import die_at, raised_by, run_ranks, values
from tests.ranks.models import Training, checkpointer, committed, files, flip_byte, step_files, truncate

SHARD = "rank-00001.safetensors"


def save_steps(rank, world, root, steps, kind="plain"):
    """Save after each of some steps; fingerprints by step."""
    training = Training(kind, rank)
    prints = {}
    with checkpointer(root, training.state) as ckpt:
        ckpt.resume()
        for step in steps:
            training.trainer["steps"] = step
            ckpt.save(step).wait()
            prints[step] = training.trainer["steps"]
    return prints


def resume(rank, world, root, step=None, local=None):
    """Resume; what came back, and the line that tells it."""
    training = Training("plain", rank, seed=1)
    lines = []
    ckpt = checkpointer(
        root, training.state, local=local, on_event=lambda e: lines.append(str(e)) if e.name == Point.RESUMED else None
    )
    with ckpt:
        error = raised_by(ckpt.resume, step)
        resumed = ckpt.statistics().resumed_from
    return {"step": resumed, "error": error, "lines": lines, "trainer": training.trainer["steps"]}


def made(tmp_path, *steps, world=2):
    """A run root with a commit of each step."""
    root = tmp_path / "run"
    values(run_ranks(world, save_steps, root, steps))
    assert committed(root) == sorted(steps)
    return root


def find(folder, step, name):
    """The one file of a step with that name, wherever it is below a folder."""
    (found,) = [Path(folder) / each for each in step_files(folder, step) if each.endswith(name)]
    return found


# --- R5 -------------------------------------------------------------------------------------------


def test_resume_takes_the_only_whole_checkpoint_of_a_root_full_of_debris(tmp_path):
    root = made(tmp_path, 5, 20, 30, 40, 50)
    # What interrupted and careless jobs left in the root:
    (root / "checkpoint-100").mkdir()  # an empty directory of another tool
    (root / "checkpoint-200").mkdir()
    (root / "checkpoint-200" / ".metadata").touch()
    (root / "data" / "step-000000000060.dead-0").mkdir()
    (root / "data" / "step-000000000070.dead-0").mkdir()
    (root / "data" / "step-000000000070.dead-0" / "test.txt").write_text("hello")
    find(root, 20, ".json").write_bytes(find(root, 20, ".json").read_bytes()[:100])  # a truncated manifest
    find(root, 30, SHARD).unlink()  # a manifest whose shard is missing
    shutil.rmtree(find(root, 40, SHARD).parent)  # a manifest without data
    truncate(find(root, 50, SHARD))
    (root / "manifests" / "step-000000000080.json").write_text("{}")  # not one of our names
    (root / "metrics.json").write_text("{}")

    results = values(run_ranks(2, resume, root))

    assert [(result["step"], result["trainer"]) for result in results] == [(5, 5)] * 2
    listed = {found.step: found for found in dcpsvc.list_checkpoints(root)}
    assert {step: found.state for step, found in listed.items()} == {
        5: "committed", 20: "incomplete", 30: "incomplete", 40: "incomplete", 50: "incomplete", 70: "incomplete",
    }  # fmt: skip
    assert "manifest" in listed[20].reason
    assert "is missing" in listed[30].reason
    assert SHARD in listed[30].reason
    assert "is missing" in listed[40].reason
    assert "bytes" in listed[50].reason
    assert "never committed" in listed[70].reason
    assert dcpsvc.latest(root).step == 5
    # Nothing foreign was touched.
    assert (root / "data" / "step-000000000070.dead-0" / "test.txt").read_text() == "hello"
    assert (root / "checkpoint-200" / ".metadata").exists()


# --- R6 -------------------------------------------------------------------------------------------


def save_until_killed(rank, world, root, point):
    training = Training("plain", rank)
    ckpt = checkpointer(root, training.state, on_event=die_at(point, step=2))
    ckpt.save(1).wait()
    ckpt.save(2).wait(30)


@pytest.mark.parametrize("point", [Point.PLAN_AGREED, Point.SHARD_WRITTEN])
def test_a_step_whose_save_was_killed_is_saved_again_by_the_next_job_and_the_debris_is_gone(tmp_path, point):
    root, local = tmp_path / "run", tmp_path / "local"
    dead = run_ranks(2, save_until_killed, root, str(point))
    assert [outcome.signal for outcome in dead] == [signal.SIGKILL] * 2
    assert committed(root) == [1]
    left = step_files(root, 2) + step_files(local, 2)
    assert left or point == Point.PLAN_AGREED

    values(run_ranks(2, save_steps, root, (2, 3)))

    assert committed(root) == [1, 2, 3]
    attempts = {found.step: found.attempt for found in dcpsvc.list_checkpoints(root)}
    assert len(step_files(root, 2)) == 3  # a manifest and two shards, all of the new attempt
    assert all(attempts[2] in name for name in step_files(root, 2) + step_files(local, 2))
    assert [found.state for found in dcpsvc.list_checkpoints(root)] == ["committed"] * 3


def test_debris_of_ranks_that_no_longer_exist_is_collected_too(tmp_path):
    root, local = tmp_path / "run", tmp_path / "local"
    run_ranks(3, save_until_killed, root, str(Point.SHARD_WRITTEN))
    assert step_files(local, 2)

    values(run_ranks(1, save_steps, root, (3,)))

    assert step_files(root, 2) == []
    assert step_files(local, 2) == []


# --- R19 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [Point.ACKED_LOCAL, Point.UPLOADED])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_upload_cut_short_is_finished_under_its_attempt_by_a_job_of_any_size_on_that_disk(tmp_path, point, world):
    root = tmp_path / "run"
    run_ranks(2, save_until_killed, root, str(point))
    (journal,) = [name for name in step_files(tmp_path / "local", 2) if name.endswith(".json")]

    found = values(run_ranks(world, resume, root))

    assert [each["step"] for each in found] == [2] * world
    assert committed(root) == [1, 2]
    assert f"step-000000000002.{dcpsvc.latest(root).attempt}.json" in journal
    assert [found.state for found in dcpsvc.list_checkpoints(root)] == ["committed"] * 2


def test_on_an_empty_disk_the_newest_commit_is_resumed_and_the_debris_at_the_root_goes_with_the_next_one(tmp_path):
    root = tmp_path / "run"
    run_ranks(2, save_until_killed, root, str(Point.UPLOADED))
    assert step_files(root, 2)
    shutil.rmtree(tmp_path / "local")

    assert [each["step"] for each in values(run_ranks(2, resume, root))] == [1, 1]
    values(run_ranks(2, save_steps, root, (2,)))

    assert [(found.step, found.state) for found in dcpsvc.list_checkpoints(root)] == [
        (1, "committed"),
        (2, "committed"),
    ]
    assert len(step_files(root, 2)) == 3


def test_a_local_shard_that_rotted_before_its_upload_is_not_committed(tmp_path):
    root, local = tmp_path / "run", tmp_path / "local"
    run_ranks(2, save_until_killed, root, str(Point.ACKED_LOCAL))
    for name in step_files(root, 2):
        (root / name).unlink()
    flip_byte(find(local, 2, SHARD))

    assert [each["step"] for each in values(run_ranks(2, resume, root))] == [1, 1]

    assert committed(root) == [1]
    assert step_files(local, 2) == []


# --- R7 -------------------------------------------------------------------------------------------


def drop(path):
    path.unlink()


@pytest.mark.parametrize("damage", [flip_byte, truncate, drop])
def test_damage_after_the_commit_makes_all_ranks_fall_back_to_the_step_before(tmp_path, damage):
    root, local = made(tmp_path, 1, 2), tmp_path / "local"
    damage(find(root, 2, SHARD))
    damage(find(local, 2, SHARD))

    results = values(run_ranks(2, resume, root))

    assert [(result["step"], result["trainer"], result["error"]) for result in results] == [(1, 1, None)] * 2
    for result in results:
        (line,) = result["lines"]
        assert "step 2" in line
        assert SHARD in line
    state = {"trainer": {}}
    error = raised_by(dcpsvc.load, root, Training("plain", 0).state, step=2)
    assert "RestoreError" in error.family
    assert SHARD in error.text
    assert dcpsvc.load(root, state, step=1) == 1
    assert state["trainer"]["steps"] == 1


def test_an_explicit_step_that_is_damaged_is_refused_on_every_rank(tmp_path):
    root, local = made(tmp_path, 1, 2), tmp_path / "local"
    flip_byte(find(root, 2, SHARD))
    flip_byte(find(local, 2, SHARD))

    for result in values(run_ranks(2, resume, root, 2)):
        assert result["step"] is None
        assert "RestoreError" in result["error"].family
        assert SHARD in result["error"].text


@pytest.mark.parametrize("damage", [flip_byte, truncate, drop])
def test_damage_in_the_local_tier_alone_costs_nothing(tmp_path, damage):
    root, local = made(tmp_path, 1, 2), tmp_path / "local"
    for name in ("rank-00000.safetensors", SHARD):
        damage(find(local, 2, name))

    assert [(r["step"], r["trainer"]) for r in values(run_ranks(2, resume, root))] == [(2, 2)] * 2


def save_large(rank, world, root):
    training = Training("plain", rank, width=64, depth=256)
    with checkpointer(root, training.state) as ckpt:
        ckpt.save(1).wait()
    return training.fingerprint()


def resume_large(rank, world, root):
    training = Training("plain", rank, seed=1, width=64, depth=256)
    with checkpointer(root, training.state) as ckpt:
        ckpt.resume()
    return training.fingerprint()


def test_local_damage_in_a_block_that_several_threads_read_costs_nothing(tmp_path):
    root, local = tmp_path / "run", tmp_path / "local"
    (saved,) = values(run_ranks(0, save_large, root))
    shard = find(local, 1, "rank-00000.safetensors")
    assert shard.stat().st_size > 4 << 20
    flip_byte(shard, (2 << 20) + 1234)  # neither the header nor the objects, which are read first

    for _ in range(5):
        assert values(run_ranks(0, resume_large, root)) == [saved]


def test_when_every_commit_is_damaged_there_is_no_fresh_start(tmp_path):
    root, local = made(tmp_path, 1, 2), tmp_path / "local"
    for step in (1, 2):
        truncate(find(root, step, SHARD))
        drop(find(local, step, SHARD))

    for result in values(run_ranks(2, resume, root)):
        assert result["step"] is None
        assert result["error"].type == "NoValidCheckpointError"
        assert "step 1" in result["error"].text
        assert "step 2" in result["error"].text
    assert raised_by(dcpsvc.load, root, {"trainer": {}}).type == "NoValidCheckpointError"


def save_again(rank, world, root):
    training = Training("plain", rank)
    with checkpointer(root, training.state) as ckpt:
        start = ckpt.resume()
        ckpt.save(2).wait()
    return start


def test_a_step_whose_commit_is_damaged_can_be_saved_anew(tmp_path):
    root, local = made(tmp_path, 1, 2), tmp_path / "local"
    truncate(find(root, 2, SHARD))
    drop(find(local, 2, SHARD))

    assert values(run_ranks(2, save_again, root)) == [1, 1]
    assert committed(root) == [1, 2]
    assert [result["step"] for result in values(run_ranks(2, resume, root))] == [2, 2]


# --- R8, R9, R15 ----------------------------------------------------------------------------------


def test_latest_goes_by_step_not_by_time_or_text(tmp_path):
    root = made(tmp_path, 10000, 900)
    for name in step_files(root, 900):
        os.utime(root / name, (4_000_000_000, 4_000_000_000))

    assert dcpsvc.latest(root).step == 10000
    assert [result["step"] for result in values(run_ranks(2, resume, root))] == [10000, 10000]


def test_a_copied_and_a_renamed_root_still_resume(tmp_path):
    root = made(tmp_path, 1, 2)
    shutil.copytree(root, tmp_path / "elsewhere" / "copy")
    root.rename(tmp_path / "renamed")

    for moved in (tmp_path / "elsewhere" / "copy", tmp_path / "renamed"):
        results = values(run_ranks(2, resume, moved, None, tmp_path / "another disk"))
        assert [(result["step"], result["trainer"]) for result in results] == [(2, 2)] * 2


def test_an_explicit_step_that_does_not_exist_is_refused_on_every_rank(tmp_path):
    root = made(tmp_path, 1, 2)

    for result in values(run_ranks(2, resume, root, 7)):
        assert result["step"] is None
        assert result["error"].type == "NoSuchStepError"
        assert (result["error"]["step"], result["error"]["available"]) == (7, [1, 2])
    assert raised_by(dcpsvc.load, root, {"trainer": {}}, step=7).type == "NoSuchStepError"


def test_a_manifest_tells_the_truth_about_its_files(tmp_path):
    root = made(tmp_path, 3, world=3)
    manifest = json.loads(find(root, 3, ".json").read_text())

    assert manifest["step"] == 3
    assert manifest["world_size"] == 3
    assert [shard["path"] for shard in manifest["shards"]] == [n for n in step_files(root, 3) if n.startswith("data/")]
    for shard in manifest["shards"]:
        assert (root / shard["path"]).stat().st_size == shard["nbytes"]
    assert files(root / "probes") == files(root / "tombstones") == []
