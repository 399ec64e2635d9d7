"""A sealed manifest with a value that makes no sense is no checkpoint, and never breaks a listing."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

import dcpsvc
from dcpsvc.errors import ManifestError
from dcpsvc.format import manifest
from tests.unit.one_process import resume, save
from tests.unit.small_manifest import parsed

if TYPE_CHECKING:
    from pathlib import Path

BAD_TIMES = [
    "2024-99-99T99:99:99Z", "0000-01-01T00:00:00Z", "2024-02-30T00:00:00Z", "٢٠٢٤-01-01T00:00:00Z",
    "2024-01-01T00:00:00.Z", "2024-01-01T00:00:00.1234567Z", "2024-01-01T24:00:01Z", "2024-01-01T00:00:00+00:00",
    "2024-01-01", "", "now", None, 1704067200, [],
]  # fmt: skip
BAD_METRICS = [[], {}, [1.5], None, True, "1.5", "hello", 10**400, -(10**400), 2**63]


def seal_again(root: Path, step: int, change: dict[str, Any]) -> None:
    (path,) = (root / "manifests").glob(f"*.step-{step:012d}.*")
    found = json.loads(path.read_bytes()) | change
    del found["digest"]
    path.write_bytes(manifest.seal(found))


@pytest.mark.parametrize("created", BAD_TIMES)
def test_a_date_that_does_not_exist_is_refused(created: Any) -> None:
    with pytest.raises(ManifestError, match="created"):
        parsed({"created": created})


@pytest.mark.parametrize("metric", BAD_METRICS, ids=lambda value: repr(value)[:20])
def test_a_metric_that_is_no_number_is_refused_by_name(metric: Any) -> None:
    with pytest.raises(ManifestError, match="'loss' is not a number"):
        parsed({"metrics": {"loss": metric}})


@pytest.mark.parametrize(("metric", "number"), [(3, 3.0), (-0.5, -0.5), ("inf", math.inf), ("-inf", -math.inf)])
def test_a_metric_that_is_a_number_is_taken(metric: Any, number: float) -> None:
    assert parsed({"metrics": {"loss": metric}}).metrics == {"loss": number}


@pytest.mark.parametrize("depth", [10, 900, 950, 1000, 1050, 1100])
def test_a_manifest_nested_too_deep_is_a_manifest_or_a_manifest_error(depth: int) -> None:
    deep: list[Any] = []
    for _ in range(depth):
        deep = [deep]
    try:
        read = parsed({"versions": {"x": deep}})
    except (ManifestError, RecursionError) as err:
        assert isinstance(err, ManifestError) or depth >= 900  # noqa: PT017 - sealing it here fails first when it is deep
    else:
        assert set(read.versions) == {"x"}


@pytest.mark.parametrize(
    "change", [*({"created": time} for time in BAD_TIMES), *({"metrics": {"loss": bad}} for bad in BAD_METRICS)],
    ids=lambda change: repr(change)[:40],
)  # fmt: skip
def test_a_listing_shows_it_as_incomplete_and_resume_takes_the_commit_before(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    for step in (1, 2):
        save(tmp_path, {"x": torch.full((2,), float(step))}, step=step)
    seal_again(tmp_path / "root", 2, change)
    good, bad = dcpsvc.list_checkpoints(tmp_path / "root")
    assert (good.step, good.state) == (1, "committed")
    assert (bad.step, bad.state) == (2, "incomplete")
    assert "manifest" in bad.reason
    assert dcpsvc.latest(tmp_path / "root").step == 1
    target = torch.zeros(2)
    assert resume(tmp_path, {"x": target}) == 1
    assert torch.equal(target, torch.ones(2))


# --- several commits of one step --------------------------------------------------------------------


def two_commits_of_step_5(tmp_path: Path) -> tuple[Path, list[str]]:
    """What two jobs that did not see each other's lock leave behind; attempts in the order of their values."""
    save(tmp_path, {"x": torch.zeros(2)}, step=1)
    root, twin = tmp_path / "root", tmp_path / "twin" / "root"
    shutil.copytree(root, twin)
    save(tmp_path, {"x": torch.full((2,), 1.0)}, step=5)
    save(tmp_path / "twin", {"x": torch.full((2,), 2.0)}, step=5)
    attempts = [next((place / "manifests").glob("*.step-000000000005.*")).stem for place in (root, twin)]
    shutil.copytree(twin, root, dirs_exist_ok=True)
    shutil.rmtree(root / "manifests" / "epochs")  # which would say that one of the two does not count
    return root, attempts


@pytest.mark.parametrize("newest", [0, 1])
def test_of_several_commits_of_one_step_the_newest_is_resumed_listed_and_loaded(tmp_path: Path, newest: int) -> None:
    root, attempts = two_commits_of_step_5(tmp_path)
    for number, attempt in enumerate(attempts):
        path = root / "manifests" / f"{attempt}.json"
        found = json.loads(path.read_bytes()) | {"created": f"2026-01-01T00:00:0{5 if number == newest else 4}.000Z"}
        del found["digest"]
        path.write_bytes(manifest.seal(found))
    expected = torch.full((2,), newest + 1.0)
    for load in (
        lambda state: resume(tmp_path, state),
        lambda state: resume(tmp_path, state, step=5),
        lambda state: dcpsvc.load(root, state),
        lambda state: dcpsvc.load(root, state, 5),
    ):
        target = torch.zeros(2)
        assert load({"x": target}) == 5
        assert torch.equal(target, expected)
    assert attempts[newest].endswith(dcpsvc.latest(root).attempt)


def test_when_the_newest_commit_of_a_step_is_damaged_the_other_is_resumed(tmp_path: Path) -> None:
    root, attempts = two_commits_of_step_5(tmp_path)
    newest = dcpsvc.latest(root).attempt
    (other,) = [number for number, attempt in enumerate(attempts) if not attempt.endswith(newest)]
    (shard,) = (root / "data").glob(f"step-000000000005.{newest}/*")
    shard.write_bytes(bytes(shard.stat().st_size))
    shutil.rmtree(tmp_path / "local")
    target = torch.zeros(2)
    assert resume(tmp_path, {"x": target}) == 5
    assert torch.equal(target, torch.full((2,), other + 1.0))
