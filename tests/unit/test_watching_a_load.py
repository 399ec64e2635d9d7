"""How far a load is: a bar on a terminal, a line now and then elsewhere, all bytes told once."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

import dcpsvc
from dcpsvc import progress
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.storage.fetch import fetch
from dcpsvc.storage.scatter import Needs, Segment
from dcpsvc.storage.shards import VerifiedShard
from tests.unit.one_shard import INTACT, RECORD

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

LOAD = """
import sys, torch, dcpsvc
dcpsvc.load(sys.argv[1], {"model": torch.nn.Linear(1000, 700)})
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    state = {"model": torch.nn.Linear(1000, 700)}
    with dcpsvc.Checkpointer(tmp_path / "root", state, local=tmp_path / "local", save_last=False) as ckpt:
        ckpt.save(1).wait(60)
    return tmp_path / "root"


@pytest.mark.parametrize("proving", [True, False])
def test_what_is_told_adds_up_to_what_was_announced(*, proving: bool) -> None:
    announced: list[int] = []
    told: list[int] = []

    @contextlib.contextmanager
    def watch(total_nbytes: int) -> Generator[Callable[[int], None]]:
        announced.append(total_nbytes)
        yield told.append

    sinks = [Segment(5, memoryview(bytearray(10))), Segment(2 * BLOCK_NBYTES, memoryview(bytearray(BLOCK_NBYTES + 3)))]
    needs = {0: Needs(sinks, RECORD.body_nbytes)}
    fetch({0: VerifiedShard([INTACT], RECORD)}, needs, proving=proving, watch=watch)
    assert announced == [sum(told)]
    assert sum(told) == RECORD.body_nbytes - BLOCK_NBYTES


def test_on_a_terminal_a_load_shows_a_bar(root: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    job = subprocess.run(
        [sys.executable, "-c", LOAD, str(root)], stderr=theirs, stdout=subprocess.PIPE, env=environment, check=True,
        timeout=50,
    )  # fmt: skip
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "resuming" in shown
    assert "━" in shown
    assert job.stdout == b""


def test_where_nobody_watches_a_short_load_says_nothing_of_it(
    root: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dcpsvc"):
        dcpsvc.load(root, {"model": torch.nn.Linear(1000, 700)})
    assert "resuming" not in caplog.text
    assert "resuming" not in capfd.readouterr().err


def test_where_nobody_watches_a_long_load_tells_the_log_now_and_then() -> None:
    said: list[str] = []
    times = iter([0.0, 5.0, 20.0])
    lines = progress.Lines("resuming", 4 << 20, said.append, clock=lambda: next(times))
    lines.advance(1 << 20)
    lines.advance(1 << 20)
    assert said == ["resuming 2.00 MiB of 4.00 MiB, 102.40 KiB/s, 20 s left"]
