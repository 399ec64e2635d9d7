"""Two jobs on one run root of a server where a conditional create has several winners: the fence alone decides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from store_contract import RACERS, race

import dcpsvc
from dcpsvc.storage.open import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.s3.servers import Server

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

ROUNDS, STEPS = 4, (10, 20, 30)
SOURCE = str(Path(dcpsvc.__file__).parents[1])

JOB = """
import json, sys, torch, dcpsvc

root, options, local, number = sys.argv[1:]
for line in sys.stdin:
    told = {"committed": [], "refused": ""}
    try:
        state = {"who": torch.zeros(1000, dtype=torch.int64), "step": 0}
        with dcpsvc.Checkpointer(
            root + line.strip(), state, local=local, storage_options=json.loads(options), save_last=False
        ) as ckpt:
            ckpt.resume()
            for step in (10, 20, 30):
                state["who"].fill_(int(number))
                state["step"] = step + int(number)
                ckpt.save(step + int(number)).wait(60)
                told["committed"].append(step + int(number))
    except dcpsvc.DcpsvcError as err:
        told["refused"] = type(err).__name__
    print(json.dumps(told), flush=True)
"""


@pytest.fixture
def root(swift: Server) -> str:
    return f"s3://{swift.bucket}/{uuid.uuid4().hex}/run"


@pytest.fixture
def jobs(swift: Server, root: str, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    options = json.dumps(swift.storage_options)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, root, options, str(tmp_path / str(number)), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": SOURCE},
        )
        for number in (1, 2)
    ]
    yield started
    for one in started:
        one.kill()
        one.communicate()


def told(job: subprocess.Popen[str]) -> dict[str, Any]:
    assert job.stdout
    outcome: dict[str, Any] = json.loads(job.stdout.readline())
    return outcome


def test_swift_lets_several_win_a_conditional_create(swift: Server, root: str) -> None:
    clients = [open_store(root, swift.storage_options) for _ in range(RACERS)]
    winners = [len(race(lambda racer: clients[racer], f"manifests/{round_}")) for round_ in range(25)]
    assert max(winners) > 1, "the tests beside this one need such a server"


def test_of_two_jobs_at_once_what_was_confirmed_stays_and_the_newer_owner_alone_goes_on(
    swift: Server, root: str, jobs: list[subprocess.Popen[str]]
) -> None:
    for round_ in range(ROUNDS):
        for job in jobs:
            assert job.stdin
            job.stdin.write(f"-{round_}\n")
            job.stdin.flush()
        outcomes = [told(job) for job in jobs]
        where = f"{root}-{round_}"
        found = dcpsvc.list_checkpoints(where, storage_options=swift.storage_options)
        counting = {one.step for one in found if one.state == "committed"}
        assert {step for one in outcomes for step in one["committed"]} <= counting
        assert {one["refused"] for one in outcomes} <= {"", "FencedError", "RunBusyError", "RootError"}
        done = [number for number, one in enumerate(outcomes, 1) if not one["refused"]]
        assert done, outcomes
        state = {"who": torch.zeros(1000, dtype=torch.int64), "step": 0}
        newest = dcpsvc.load(where, state, storage_options=swift.storage_options)
        assert newest in {STEPS[-1] + number for number in done}
        assert state["step"] == newest
        assert (state["who"] == newest - STEPS[-1]).all()
