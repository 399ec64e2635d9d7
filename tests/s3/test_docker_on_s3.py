"""What docker/ shows, run as its script runs it where there is no docker engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.s3.servers import CHOSEN

if TYPE_CHECKING:
    from tests.s3.servers import Server

pytestmark = [pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(400)]

SCRIPT = Path(__file__).parents[2] / "docker" / "without_docker.sh"
STEPS = 60


def processes_of(place: Path) -> list[str]:
    found: list[str] = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if str(place).encode() in command:
                found.append(command.decode(errors="replace"))
    return found


def test_the_script_trains_stops_at_sigterm_resumes_to_the_end_and_leaves_nothing(
    s3_server: Server, tmp_path: Path
) -> None:
    env = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    if s3_server.kind:
        env |= {CHOSEN: s3_server.kind.name, s3_server.kind.variable: str(s3_server.kind.home)}
    done = subprocess.run(
        [str(SCRIPT), str(STEPS)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=380, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert told[-1] == f"== step {STEPS} is committed"
    stopped_at = int(told[-2].split()[2])
    assert 0 < stopped_at <= STEPS
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []
