"""Going back to an older step by name deletes nothing that is newer, and the local tier never fills."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import dcpsvc
from dcpsvc import Checkpointer, Everything, Latest
from dcpsvc.errors import SaveFailedError, StepExistsError

if TYPE_CHECKING:
    from pathlib import Path

BOUND_S = 30.0


def checkpointer(folder: Path, state: dict[str, Any], **options: Any) -> Checkpointer:
    return Checkpointer(folder / "root", state, local=folder / "local", save_last=False, **options)


def save(ckpt: Checkpointer, *steps: int) -> None:
    """Save, with the step as the value."""
    for step in steps:
        ckpt.state["x"].fill_(step)
        ckpt.save(step).wait(BOUND_S)
        ckpt.wait(BOUND_S)


def committed(folder: Path) -> list[int]:
    return [found.step for found in dcpsvc.list_checkpoints(folder / "root") if found.state == "committed"]


@pytest.fixture
def five(tmp_path: Path) -> Path:
    """A run of five commits."""
    with checkpointer(tmp_path, {"x": torch.zeros(2)}) as ckpt:
        save(ckpt, 100, 200, 300, 400, 500)
    return tmp_path


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_after_going_back_the_new_commits_and_the_newer_ones_stay(five: Path, keep: int) -> None:
    with checkpointer(five, {"x": torch.zeros(2)}, keep=Latest(keep)) as ckpt:
        assert ckpt.resume(step=300) == 300
        assert torch.equal(ckpt.state["x"], torch.full((2,), 300.0))
        save(ckpt, 350)
        assert committed(five) == {1: [], 2: [], 3: [200]}[keep] + [300, 350, 400, 500]
        save(ckpt, 360, 370)
        assert committed(five) == [300, *{1: [], 2: [360], 3: [350, 360]}[keep], 370, 400, 500]
    for step in (300, 370, 400, 500):
        target = torch.zeros(2)
        assert dcpsvc.load(five / "root", {"x": target}, step) == step
        assert torch.equal(target, torch.full((2,), float(step)))


def test_a_warning_names_the_newer_commits_and_their_steps_cannot_be_saved(
    five: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with checkpointer(five, {"x": torch.zeros(2)}, keep=Latest(2)) as ckpt:
        ckpt.resume(step=300)
        (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert "resumed from step 300 by name" in warning
        assert "[400, 500]" in warning
        for step in (300, 400, 500):
            with pytest.raises(StepExistsError):
                ckpt.save(step)
        save(ckpt, 450)
    assert committed(five) == [300, 400, 450, 500]


def test_resuming_the_newest_by_name_warns_of_nothing(five: Path, caplog: pytest.LogCaptureFixture) -> None:
    with checkpointer(five, {"x": torch.zeros(2)}, keep=Latest(2)) as ckpt:
        assert ckpt.resume(step=500) == 500
        save(ckpt, 600)
    assert committed(five) == [500, 600]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_next_job_counts_every_commit_again(five: Path) -> None:
    with checkpointer(five, {"x": torch.zeros(2)}, keep=Latest(2)) as ckpt:
        ckpt.resume(step=300)
        save(ckpt, 350)
    with checkpointer(five, {"x": torch.zeros(2)}, keep=Latest(2)) as ckpt:
        assert ckpt.resume() == 500
        save(ckpt, 600)
    assert committed(five) == [500, 600]


# --- the local tier ---------------------------------------------------------------------------------


def local_attempts(folder: Path, rank: int = 0) -> tuple[list[str], list[str]]:
    """Attempts of a rank on the local tier: those with a shard, those with a manifest."""
    local = folder / "local"
    shards = sorted(path.parent.name for path in local.glob(f"*/data/*/rank-{rank:05d}.safetensors"))
    return shards, sorted(path.stem.partition(".")[2] for path in local.glob("*/manifests/*"))


@pytest.mark.parametrize("keep", [Everything(), Latest(10), Latest(1)])
@pytest.mark.parametrize("keep_local", [1, 2, 3])
def test_no_more_than_keep_local_attempts_stay_on_the_local_tier_after_any_save(
    tmp_path: Path, keep: dcpsvc.policies.Keep, keep_local: int
) -> None:
    with checkpointer(tmp_path, {"x": torch.zeros(2)}, keep=keep, keep_local=keep_local) as ckpt:
        for step in range(1, 6):
            save(ckpt, step)
            shards, manifests = local_attempts(tmp_path)
            assert shards == manifests
            assert len(shards) <= keep_local
            assert shards[-1].startswith(f"step-{step:012d}.")
    if not isinstance(keep, Latest):
        assert committed(tmp_path) == [1, 2, 3, 4, 5]


def test_over_many_jobs_the_local_tier_holds_the_newest_2(tmp_path: Path) -> None:
    for step in range(1, 6):
        with checkpointer(tmp_path, {"x": torch.zeros(2)}) as ckpt:
            assert ckpt.resume() == step - 1
            save(ckpt, step)
    shards, _ = local_attempts(tmp_path)
    assert [name[: len("step-000000000005")] for name in shards] == ["step-000000000004", "step-000000000005"]
    assert committed(tmp_path) == [1, 2, 3, 4, 5]


def test_a_failed_save_leaves_nothing_on_the_local_tier_and_the_good_ones_stay(tmp_path: Path) -> None:
    with checkpointer(tmp_path, {"x": torch.zeros(2)}) as ckpt:
        save(ckpt, 1, 2)
        before = local_attempts(tmp_path)
        data = tmp_path / "root" / "data"
        data.rename(tmp_path / "aside")
        data.write_text("a file where a folder belongs")
        with pytest.raises(SaveFailedError):
            ckpt.save(3).wait(BOUND_S)
        ckpt.wait(BOUND_S)  # until what the failure left is gone
        assert local_attempts(tmp_path) == before
        data.unlink()
        (tmp_path / "aside").rename(data)
        save(ckpt, 4)
    assert [name[:17] for name in local_attempts(tmp_path)[0]] == ["step-000000000002", "step-000000000004"]


def test_shards_of_a_larger_job_on_this_disk_go_with_the_attempts_that_go(tmp_path: Path) -> None:
    with checkpointer(tmp_path, {"x": torch.zeros(2)}, keep_local=1) as ckpt:
        save(ckpt, 1)
        (shard,) = (tmp_path / "local").glob("*/data/*/*")
        ghost = shard.with_name("rank-00001.safetensors")
        ghost.write_bytes(b"of a rank that is no more")
        save(ckpt, 2, 3)
        assert not ghost.exists()
        assert len(local_attempts(tmp_path)[0]) == 1
