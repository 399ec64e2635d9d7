"""Commands that look at a run while its job commits and deletes there all the time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from dcpsvc.cli import cli
from dcpsvc.errors import DcpsvcError, NoSuchStepError
from dcpsvc.reading import open_root
from dcpsvc.stages import discover
from tests.e2e.jobs import BOUND_S, live_job

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

LOOKED_S = 15


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The run of a job that saves at every step and keeps two; it has deleted some."""
    with live_job(tmp_path, lambda root: newest(root) >= 5, saves=True) as process:
        yield tmp_path / "run"
        assert process.poll() is None, (tmp_path / "output").read_text()


def newest(root: Path) -> int:
    try:
        return max((one.step for one in discover.committed(open_root(root))), default=0)
    except DcpsvcError:
        return 0


def is_on_its_way(row: dict[str, object]) -> bool:
    """Whether that is all there is to say against a line of ``ls``: a save that goes on, or a deletion that does."""
    return str(row["reason"]).startswith(("no manifest", "never committed, or being deleted"))


def told(name: str, root: Path, *arguments: object, codes: tuple[int, ...] = (0,)) -> str:
    done = CliRunner().invoke(cli, [name, str(root), *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit | DcpsvcError), done.exception
    if not isinstance(done.exception, DcpsvcError):
        assert done.exit_code in codes, (name, done.output)
        return done.stdout
    assert 1 in codes, (name, done.exception)
    assert isinstance(done.exception, NoSuchStepError), (name, done.exception)  # deleted, and not damaged
    return ""


def test_what_is_committed_and_deleted_meanwhile_is_never_told_as_damaged(root, tmp_path):
    began, first, rounds = time.monotonic(), newest(root), 0
    while time.monotonic() < began + LOOKED_S:
        before = newest(root)
        listed = json.loads(told("ls", root, "--json"))
        after = newest(root)
        committed = [row["step"] for row in listed if row["state"] == "committed"]
        assert committed, listed
        assert before <= committed[-1] <= after
        assert not [row for row in listed if row["state"] != "committed" and not is_on_its_way(row)], listed
        found = json.loads(told("verify", root, "--json"))
        assert [each for each in found if each["intact"]], found
        assert not [each for each in found if each["problems"]], found
        used = json.loads(told("du", root, "--json"))
        assert used["kinds"]["checkpoints"] >= used["checkpoints"][-1]["nbytes"] > 0
        assert used["total"] == sum(used["kinds"].values())
        told("report", root, "--output", tmp_path / "page.html")
        # These name one step, which the job may delete meanwhile: then that is what they say.
        for name in ("show", "fetch", "export"):
            given = {"fetch": (tmp_path / f"f{rounds}",), "export": (tmp_path / f"e{rounds}", "--format", "hf")}
            told(name, root, "latest", *given.get(name, ()), codes=(0, 1))
        rounds += 1
    assert newest(root) > first + 5
    assert rounds > 3


@pytest.mark.parametrize("name", ["ls", "verify", "du", "report"])
def test_the_program_ends_well_and_without_a_traceback(name, root, tmp_path):
    given = ("--output", str(tmp_path / "page.html")) if name == "report" else ()
    command = [sys.executable, "-m", "dcpsvc", name, str(root), *given]
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOUND_S)
        told = [line for line in done.stderr.splitlines() if "no times of saves" not in line]  # of a job without a log
        assert (done.returncode, told) == (0, []), done.stdout
