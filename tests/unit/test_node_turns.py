"""The ranks of a node share what it may ask of a store at once: never more, none idle, and nothing left by the dead."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import dcpsvc
from dcpsvc.config import Limits, Options, outside_a_job
from dcpsvc.storage.nodeturns import NodeTurns
from dcpsvc.storage.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Rank = Callable[..., subprocess.Popen[str]]

SOURCE = str(Path(dcpsvc.__file__).parents[1])
PATIENCE_S = 30.0

TRANSFERS = """
import json, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from dcpsvc.config import Limits
from dcpsvc.storage.pace import Pace

folder, at_once, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
pace = Pace(Limits(concurrency=4, node_concurrency=at_once, node_folder=folder))

def transfer(_):
    with pace.turn(1):
        began = time.monotonic()
        threading.Event().wait(0.002)
        return began, time.monotonic()

with ThreadPoolExecutor(4) as pool:
    print(json.dumps(list(pool.map(transfer, range(count)))))
"""

HOLDER = """
import contextlib, os, sys
from pathlib import Path
from dcpsvc.storage.nodeturns import NodeTurns

turns = NodeTurns(Path(sys.argv[1]), int(sys.argv[2]))
with contextlib.ExitStack() as held:
    for _ in range(int(sys.argv[2])):
        held.enter_context(turns.turn())
    child = os.fork()
    if child == 0:  # a data loader worker, which lives a moment longer
        sys.stdin.read()
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
"""


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    """Starts another process of the node."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(tmp_path / "turns"), *map(str, arguments)]
        env = {**os.environ, "PYTHONPATH": SOURCE}
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


def most_at_once(spans: list[tuple[float, float]]) -> int:
    changes = sorted(change for begin, end in spans for change in ((begin, 1), (end, -1)))
    return max(itertools.accumulate(more for _, more in changes))


def test_three_processes_of_four_threads_never_transfer_more_at_once_than_their_node_may(rank: Rank) -> None:
    ranks = [rank(TRANSFERS, 3, 60) for _ in range(3)]
    spans = [span for one in ranks for span in json.loads(one.communicate(timeout=PATIENCE_S)[0])]
    assert len(spans) == 180
    assert most_at_once(spans) == 3


def test_a_busy_process_has_what_the_idle_ones_do_not_use(tmp_path: Path) -> None:
    turns, together = NodeTurns(tmp_path / "turns", 4), threading.Barrier(4)

    def transfer(_: int) -> None:
        with turns.turn():
            together.wait(PATIENCE_S)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(transfer, range(4)))


def test_a_killed_process_leaves_no_turn_taken_even_while_its_children_live(rank: Rank, tmp_path: Path) -> None:
    holder = rank(HOLDER, 2)
    assert holder.stdout
    child = int(holder.stdout.readline())
    began = time.monotonic()
    holder.send_signal(signal.SIGKILL)
    with NodeTurns(tmp_path / "turns", 2).turn(), NodeTurns(tmp_path / "turns", 2).turn():
        os.kill(child, 0)
    assert time.monotonic() - began < PATIENCE_S / 2


def test_a_process_that_never_gets_a_turn_takes_one_beyond_the_number_and_not_two(rank: Rank, tmp_path: Path) -> None:
    holder = rank(HOLDER, 2)
    assert holder.stdout
    holder.stdout.readline()
    turns, lock, under_way, most = NodeTurns(tmp_path / "turns", 2, patience_s=0.05), threading.Lock(), 0, 0

    def transfer(_: int) -> None:
        nonlocal under_way, most
        with turns.turn():
            with lock:
                under_way += 1
                most = max(most, under_way)
            threading.Event().wait(0.2)
            with lock:
                under_way -= 1

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(transfer, range(3)))
    assert most == 1


def test_nobody_waits_for_a_turn_when_all_is_over(rank: Rank, tmp_path: Path) -> None:
    holder = rank(HOLDER, 1)
    assert holder.stdout
    holder.stdout.readline()
    over = threading.Event()
    over.set()
    limits, began = Limits(node_concurrency=1, node_folder=tmp_path / "turns"), time.monotonic()
    with Pace(limits, pause=over.wait).turn(1):
        assert time.monotonic() - began < PATIENCE_S / 2


def test_where_the_files_cannot_be_made_nobody_waits(tmp_path: Path) -> None:
    turns = NodeTurns(tmp_path / "no such disk" / "local" / "turns", 1)
    with turns.turn(), turns.turn():
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_process_outside_a_job_takes_turns_where_jobs_do_though_none_has_been_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCPSVC_LOCAL", str(tmp_path / "local"))
    limits, waited = outside_a_job(), threading.Event()
    assert limits.node_folder == Options().local_dir / "turns"

    def give_up(_: float) -> bool:
        waited.set()
        return True

    job = NodeTurns(tmp_path / "local" / "turns", 32, pause=give_up)
    with contextlib.ExitStack() as taken:
        taken.enter_context(Pace(limits).turn(1))
        for _ in range(31):
            taken.enter_context(job.turn())
        assert not waited.is_set()
        taken.enter_context(job.turn())
        assert waited.is_set()
    assert (tmp_path / "local").stat().st_mode & 0o777 == 0o700


def test_a_folder_of_somebody_else_in_tmp_is_not_touched(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path / "local").mkdir()
    try:
        os.chown(tmp_path / "local", os.geteuid() + 1, -1)
    except PermissionError:
        pytest.skip("only root can make a folder of somebody else")
    with NodeTurns(tmp_path / "local" / "turns", 1).turn():
        assert list((tmp_path / "local").iterdir()) == []
