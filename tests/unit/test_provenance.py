"""R36: what made a checkpoint is recorded, and what has changed since is said when it is resumed."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from importlib import metadata
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from dcpsvc import Checkpointer, provenance
from dcpsvc.errors import ConfigError
from dcpsvc.format import manifest
from tests.unit.one_process import resume, save

if TYPE_CHECKING:
    from pathlib import Path


def test_the_record_tells_versions_ranks_and_the_hash_of_the_configuration() -> None:
    found = provenance.record([nn.Linear(1, 1)], world_size=4, config={"lr": 0.1, "layers": [1, 2]})
    assert (found["torch"], found["world"]) == (str(torch.__version__), "4")
    assert len(found["config"]) == 32
    assert "mesh" not in found
    assert "lr" not in str(found)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"b": [1, (2,)], "a": None}, True),
        ({"a": None, "b": [1, [3]]}, False),
        ({"a": 0, "b": [1, [2]]}, False),
        ({}, False),
    ],
)
def test_configurations_are_the_same_whatever_the_order_of_their_keys(other: dict[str, object], *, same: bool) -> None:
    one, two = (provenance.record([], world_size=1, config=c)["config"] for c in ({"a": None, "b": (1, [2])}, other))
    assert (one == two) == same


def test_a_configuration_that_is_not_json_like_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config= is not JSON-like"):
        Checkpointer(tmp_path / "root", {"x": torch.ones(1)}, local=tmp_path / "local", config={"fn": print})
    assert not (tmp_path / "root").exists()


def test_the_commit_is_that_of_the_checkout_the_job_runs_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "git" not in provenance.record([], world_size=1)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *command], check=True)  # noqa: S607 - whichever there is
    commit = provenance.record([], world_size=1)["git"]
    assert len(commit) == 40
    (tmp_path / "train.py").write_text("new")
    assert provenance.record([], world_size=1)["git"] == commit  # nobody knows whether it is of the code
    subprocess.run(["git", "add", "train.py"], check=True)  # noqa: S607
    assert provenance.record([], world_size=1)["git"] == f"{commit} with uncommitted changes"


@pytest.mark.parametrize("library", ["accelerate", "lightning", "peft", "transformers"])
def test_libraries_are_recorded_where_the_job_has_imported_them(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, library, raising=False)
    assert library not in provenance.record([], world_size=1)
    pytest.importorskip(library)
    assert provenance.record([], world_size=1)[library] == metadata.version(library)


def test_changes_are_told_with_what_to_do_and_other_ranks_are_none() -> None:
    saved = {"torch": "2.12.0", "git": "a" * 40, "config": "1", "world": "4", "mesh": "dp=4", "gone": "x"}
    now = {"torch": "2.13.0", "git": "a" * 40, "config": "2", "world": "8", "mesh": "dp=8", "new": "y"}
    assert provenance.changes(saved, now) == [
        "torch was 2.12.0, is 2.13.0",
        "config was 1, is 2: the configuration is another; compare the two, or start a new run",
    ]


def test_a_resume_under_another_torch_says_so_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, {"x": torch.ones(1)}, step=3)
    assert resume(tmp_path, {"x": torch.zeros(1)}) == 3
    assert "torch was" not in caplog.text
    (path,) = (tmp_path / "root" / "manifests").glob("*.step-*.json")
    key = f"manifests/{path.name}"
    older = dataclasses.replace(manifest.loads(key, path.read_bytes()), versions={"torch": "1.0"})
    path.write_bytes(older.dumps())
    with caplog.at_level(logging.WARNING, "dcpsvc"):
        assert resume(tmp_path, {"x": torch.zeros(1)}) == 3
    assert f"resumed step 3: torch was 1.0, is {torch.__version__}" in caplog.text
