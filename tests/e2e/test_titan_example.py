"""R27 R32: the example of a loop like torchtitan's, run with torchrun, killed with SIGKILL: it goes on bit for bit."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import dcpsvc
from dcpsvc.reading import open_root
from dcpsvc.stages import discover
from dcpsvc.tools.processes import Family
from tests.e2e.jobs import ENVIRONMENT, TORCHRUN

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("torchdata")

SCRIPT = Path(__file__).parents[2] / "examples" / "train_titan.py"
LINE = re.compile(r"rank (\d+) step (\d+) loss [-+.0-9a-fx]+p[-+]\d+")
FOR_EVER = 10**9

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@contextmanager
def training(folder: Path, steps: int) -> Iterator[subprocess.Popen[bytes]]:
    arguments = ["--root", str(folder / "run"), "--nvme", str(folder / "local"), "--steps", str(steps), "--every", "5"]
    command = [*TORCHRUN, str(SCRIPT), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT
    ) as process:
        try:
            yield process
        finally:
            Family(process).kill()


def told(folder: Path, steps: int) -> dict[tuple[int, int], str]:
    """What each rank printed at each step."""
    with training(folder, steps) as process:
        said = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 0, said[-4000:]
    return {(int(line[1]), int(line[2])): line[0] for line in LINE.finditer(said)}


def kill_after_a_commit(folder: Path) -> int:
    """Both ranks at once, a step or more after a commit; the newest step that is committed then."""
    with training(folder, FOR_EVER) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found = LINE.search(line.decode())
            if found and int(found[2]) > 7 and discover.committed(open_root(folder / "run")):
                break
        Family(process).kill()
    newest = dcpsvc.latest(folder / "run")
    assert newest is not None
    return newest.step


def test_a_loop_like_that_of_torchtitan_killed_with_sigkill_goes_on_bit_for_bit(tmp_path: Path) -> None:
    committed = kill_after_a_commit(tmp_path / "killed")
    resumed = told(tmp_path / "killed", committed + 8)
    straight = told(tmp_path / "straight", committed + 8)
    assert sorted(resumed) == [(rank, step) for rank in range(2) for step in range(committed + 1, committed + 9)]
    assert resumed == {at: straight[at] for at in resumed}
    assert resumed[0, committed + 1].split()[-1] != resumed[1, committed + 1].split()[-1]  # each rank its own data
