"""dcpsvc pin and unpin: what they say is in the listing, and a policy honours it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from click.testing import CliRunner

import dcpsvc
from dcpsvc.cli import cli
from dcpsvc.errors import NoSuchStepError
from dcpsvc.reading import open_root
from dcpsvc.tools import listing

if TYPE_CHECKING:
    from pathlib import Path


def train(folder: Path, steps: range, **options: Any) -> None:
    state = {"w": torch.ones(3)}
    with dcpsvc.Checkpointer(folder / "root", state, local=folder / "local", save_last=False, **options) as ckpt:
        for step in steps:
            ckpt.save(step).wait(30)
        ckpt.wait(30)


def reasons(folder: Path) -> dict[int, tuple[str, ...]]:
    return {row.checkpoint.step: row.reasons for row in listing.rows(open_root(folder / "root"))}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_a_pinned_step_says_so_stays_and_goes_when_it_is_unpinned(tmp_path: Path) -> None:
    train(tmp_path, range(1, 4))
    assert reasons(tmp_path) == {1: (), 2: (), 3: ()}
    assert run("pin", tmp_path / "root", 1, "--note", "for the paper").exit_code == 0
    assert "for the paper" in " ".join(reasons(tmp_path)[1])
    train(tmp_path, range(4, 6), keep=dcpsvc.Latest(1))
    left = reasons(tmp_path)
    assert sorted(left) == [1, 5]
    assert "for the paper" in " ".join(left[1])
    assert all(left.values())
    assert run("unpin", tmp_path / "root", 1).exit_code == 0
    train(tmp_path, range(6, 7), keep=dcpsvc.Latest(1))
    assert sorted(reasons(tmp_path)) == [6]


def test_a_step_that_is_not_there_cannot_be_pinned(tmp_path: Path) -> None:
    train(tmp_path, range(1, 2))
    result = run("pin", tmp_path / "root", 7)
    assert isinstance(result.exception, NoSuchStepError)
    assert "step 7" in str(result.exception)
