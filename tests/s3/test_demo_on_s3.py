"""The demo with its checkpoints on a real S3 server: a rank is killed in the middle of a save, and so is the server."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.s3 import spoiling as faults

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.s3.servers import Server
    from tests.s3.spoiling import Proxy, Spoiler

pytestmark = [pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(400)]

STEPS, EVERY = 15, 5


@pytest.fixture
def play(run_root: str, options: dict[str, Any], tmp_path: Path) -> Callable[[], dict[str, Any]]:
    """Run it to its end, through the proxy; its JSON document."""
    given = {**options, "config_kwargs": {}}

    def play() -> dict[str, Any]:
        told = [part for name, value in given.items() for part in ("-o", f"{name}={_text(value)}")]
        command = [
            sys.executable, "-m", "dcpsvc", "demo", "--json", f"--steps={STEPS}", f"--every={EVERY}",
            f"--dir={tmp_path / 'demo'}", f"--root={run_root}", *told,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=380, check=False)
        assert done.stdout, done.stderr
        outcome: dict[str, Any] = json.loads(done.stdout)
        assert (done.returncode, outcome["error"]) == (0, None)
        return outcome

    return play


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def check(outcome: dict[str, Any]) -> None:
    print(json.dumps({name: value for name, value in outcome.items() if name != "directory"}, indent=1))
    assert outcome["killed"] == {"phase": "shard-written", "step": 2 * EVERY, "rank": 1}
    assert outcome["resumed_from"] == EVERY
    assert outcome["identical"] == outcome["steps"] == STEPS
    assert [row["step"] for row in outcome["checkpoints"] if row["state"] == "committed"] == [5, 10, 15]


def test_a_job_on_s3_that_loses_a_rank_in_the_middle_of_a_save_comes_back_bit_for_bit(
    play: Callable[[], dict[str, Any]],
) -> None:
    check(play())


def test_and_so_it_does_when_the_server_is_killed_under_an_upload_and_under_a_commit(
    play: Callable[[], dict[str, Any]], between: Proxy, s3_server: Server
) -> None:
    s3_server.skip_unless_ours()
    killed: list[str] = []

    def kills_the_server(spoiler: Spoiler) -> None:
        """It dies with the request, and is back after a while with the data it had."""
        killed.append(spoiler.path)
        s3_server.stop("KILL")
        try:
            faults.loses_the_answer(spoiler)
        except OSError:
            spoiler.reset()
        finally:
            s3_server.start()

    between.spoil(f"^PUT .*/run/data/step-{EVERY:012d}.*rank-", kills_the_server)
    between.spoil(f"^PUT .*/run/manifests/[^/]*step-{STEPS:012d}", kills_the_server)
    check(play())
    assert len(killed) == 2
