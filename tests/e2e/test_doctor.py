"""``dcpsvc doctor`` as people start it: alone, under torchrun, and with torchrun after ``--``."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import dcpsvc
from tests.e2e.jobs import ENVIRONMENT, TORCHRUN
from tests.s3.servers import free_port

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(180)


def doctor(*arguments: object, command: tuple[str, ...] = (sys.executable, "-m", "dcpsvc")):
    return subprocess.run(
        [*command, "doctor", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=150
    )


def paths(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def verdicts(document) -> dict[str, str]:
    return {finding["name"]: finding["verdict"] for finding in document["findings"]}


def test_one_process_examines_a_new_root_and_nothing_stays(tmp_path):
    done = doctor(
        tmp_path / "runs" / "new", "--local", tmp_path / "local", "--size", "4MiB", "--model", "10GB", "--json"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    for name in ("permissions", "listings", "conditional create", "save and commit", "verify", "load", "delete"):
        assert verdicts(found)[name] == "ok", found
    assert found["measured"]["shard_nbytes"] > 4 << 20
    assert found["forecast"]["stall_s"] > 0
    assert paths(tmp_path) == {"local"}


def test_the_ranks_of_a_launcher_examine_together_and_leave_a_run_as_it_was(tmp_path):
    with dcpsvc.Checkpointer(tmp_path / "root", {"x": 1}, local=tmp_path / "run-local") as ckpt:
        ckpt.save(1).wait(30)
    before = paths(tmp_path)
    done = doctor(tmp_path / "root", "--local", tmp_path / "local", "--size", "1MiB", "--json", "--", *TORCHRUN)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ranks"] == 2
    assert found["measured"]["ranks"] == 2
    assert verdicts(found)["shared root"] == "ok"
    assert verdicts(found)["clocks"] == "ok"
    assert paths(tmp_path) == before | {"local"}
    assert [each.state for each in dcpsvc.list_checkpoints(tmp_path / "root")] == ["committed"]


def test_without_a_size_the_newest_commit_says_it(tmp_path):
    with dcpsvc.Checkpointer(tmp_path / "root", {"x": list(range(10000))}, local=tmp_path / "run-local") as ckpt:
        ckpt.save(7).wait(30)
    (newest,) = dcpsvc.list_checkpoints(tmp_path / "root")
    asked = (tmp_path / "root", "--local", tmp_path / "local", "--size", "1MiB")
    told = json.loads(doctor(*asked, "--json").stdout)["forecast"]
    assert (told["step"], told["model_nbytes"], told["ranks"]) == (7, newest.nbytes, 1)
    said = doctor(*asked, "--model", "1GB", "--json").stdout
    assert (json.loads(said)["forecast"]["step"], json.loads(said)["forecast"]["model_nbytes"]) == (None, 10**9)
    assert "on 1 rank, like step 7 there: training waits" in doctor(*asked).stdout


def test_started_under_a_launcher_one_rank_speaks(tmp_path):
    command = (*TORCHRUN, "-m", "dcpsvc")
    os.environ["DCPSVC_LOCAL"] = str(tmp_path / "local")
    try:
        done = doctor(tmp_path / "root", "--size", "1MiB", command=command)
    finally:
        del os.environ["DCPSVC_LOCAL"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("save and commit") == 1
    assert "2 ranks" in done.stdout


def test_a_root_that_cannot_be_written_fails_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("no directory")
    done = doctor(tmp_path / "file" / "root", "--local", tmp_path / "local", "--size", "1MiB")
    assert done.returncode == 1
    assert "cannot write" in done.stdout
    assert "->" in done.stdout
    assert "jobs do not work here" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_local_tier_that_cannot_be_written_fails(tmp_path):
    (tmp_path / "file").write_text("no directory")
    done = doctor(tmp_path / "root", "--local", tmp_path / "file" / "local", "--size", "1MiB", "--json")
    assert done.returncode == 1
    assert verdicts(json.loads(done.stdout))["local disk"] == "fail"
    assert paths(tmp_path) == {"file"}


def test_a_launcher_that_does_not_start_is_told(tmp_path):
    done = doctor(tmp_path / "root", "--", "no-such-launcher")
    assert done.returncode == 2
    assert "no-such-launcher" in done.stderr
    done = doctor(tmp_path / "root", "--", "false")
    assert done.returncode == 1
    assert "before its ranks gave a verdict" in done.stderr


@contextlib.contextmanager
def one_of_two(rank: int, port: int, folder: Path):
    command = [sys.executable, "-m", "dcpsvc", "doctor", folder / "root", "--local", folder / "local", "--json"]
    places = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with subprocess.Popen(
        [*command, "--size", "1MiB", "--timeout", "8"],
        env=os.environ | ENVIRONMENT | places,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def missing(process: subprocess.Popen[str]) -> str:
    """What a doctor says of the other rank, which is its last word."""
    out, err = process.communicate(timeout=100)
    assert "Traceback" not in err, err
    (finding,) = json.loads(out)["findings"]
    assert (process.returncode, finding["name"], finding["verdict"]) == (1, "ranks", "fail")
    assert "MASTER_ADDR" in finding["remedy"]
    return finding["found"]


def test_a_rank_that_never_comes_is_a_finding(tmp_path):
    with one_of_two(0, free_port(), tmp_path) as process:
        assert "1/2 clients joined" in missing(process)


def test_a_rank_that_is_killed_in_the_middle_is_named(tmp_path):
    port = free_port()
    with one_of_two(0, port, tmp_path) as process, one_of_two(1, port, tmp_path) as other:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("root/probes/*")):
            assert time.monotonic() < deadline
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.05)
        other.kill()
        assert "rank 1 did not come within" in missing(process)
