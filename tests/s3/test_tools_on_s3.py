"""The tools on a real S3 server: what they tell of a run, and what they make of it, is what they do on a disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
import torch

import dcpsvc
from dcpsvc.cli import cli
from dcpsvc.format import keys
from dcpsvc.stages import discover
from dcpsvc.storage.base import written_s
from dcpsvc.storage.open import open_store
from tests.s3.commands import ARGUMENTS, CODES, options_of

if TYPE_CHECKING:
    from tests.s3.servers import Server


pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

PROGRAM = Path(sys.executable).with_name("dcpsvc")


@pytest.fixture
def root(s3_server: Server, tmp_path: Path) -> str:
    """Two committed steps, and a log."""
    url = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}/run"
    log = dcpsvc.RunLog(url, storage_options=s3_server.storage_options)
    model = torch.nn.Linear(1000, 300)
    state = {"model": model, "optim": torch.optim.SGD(model.parameters(), lr=0.5)}
    with dcpsvc.Checkpointer(
        url, state, local=tmp_path / "local", storage_options=s3_server.storage_options, on_event=log
    ) as ckpt:
        ckpt.save(1, metrics={"loss": 2.0}).wait(60)
        ckpt.save(2).wait(60)
    return url


def run(server: Server, name: str, *arguments: object, code: int = 0) -> str:
    command = [PROGRAM, name, *options_of(server), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    assert server.secret_key not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, command in cli.commands.items()
        if any(isinstance(each, click.Argument) and each.name == "root" for each in command.params)
    ],
)
def test_each_command_that_takes_a_run_root_takes_one_on_s3_and_tells_what_it_did_as_json(
    name, root, s3_server, tmp_path
):
    if name == "import":
        run(s3_server, "export", root, 1, tmp_path / "folder", "--format", "hf")
    places = {
        "ROOT": root, "ELSEWHERE": f"{root}-next", "FILE": tmp_path / "page.html", "DIR": tmp_path / "dir",
        "FOLDER": tmp_path / "folder",
    }  # fmt: skip
    given = [places.get(str(each), each) for each in ARGUMENTS[name]]
    said = run(s3_server, name, *given, "--json", code=CODES.get(name, 0))
    assert said == "" if name in CODES else json.loads(said) is not None
    if "ELSEWHERE" in ARGUMENTS[name]:
        run(s3_server, "verify", f"{root}-next")
    run(s3_server, "verify", root)


def test_a_checkpoint_on_s3_is_pinned_and_left_to_the_policy_again(root, s3_server, tmp_path):
    def stays() -> list[int]:
        plan = json.loads(run(s3_server, "gc", root, "--keep", "latest:1", "--dry-run", "--json"))
        return sorted(one["step"] for one in plan["keep"])

    assert stays() == [2]
    assert json.loads(run(s3_server, "pin", root, 1, "--note", "paper", "--json"))["note"] == "paper"
    assert stays() == [1, 2]
    assert "pinned: paper" in json.loads(run(s3_server, "ls", root, "--json"))[0]["reasons"]
    assert json.loads(run(s3_server, "unpin", root, 1, "--json"))["pins_removed"] == 1
    assert stays() == [2]
    run(s3_server, "pin", root, 7, code=1)


def test_what_was_exported_from_s3_and_imported_to_it_is_what_was_saved(root, s3_server, tmp_path):
    options = s3_server.storage_options
    run(s3_server, "export", root, 1, tmp_path / "model", "--format", "hf")
    told = json.loads(run(s3_server, "import", tmp_path / "model", f"{root}-new", 7, "--json"))
    assert (told["step"], told["tensors"]) == (7, 2)
    ours, theirs = torch.nn.Linear(1000, 300), torch.nn.Linear(1000, 300)
    assert dcpsvc.load(root, {"model": ours}, 1, storage_options=options) == 1
    assert dcpsvc.load(f"{root}-new", {"model": theirs}, storage_options=options) == 7
    assert torch.equal(ours.weight, theirs.weight)
    run(s3_server, "import", tmp_path / "model", root, 1, code=3)  # step 2 is committed there


def test_an_edit_a_difference_and_a_flipped_bit_on_s3_are_told_by_exit_code(root, s3_server):
    edited = json.loads(run(s3_server, "edit", root, 2, "--set", "optim.lr=0.25", "--json"))
    assert "0.5 -> 0.25" in edited["changes"][0]
    told = json.loads(run(s3_server, "diff", root, 1, 2, "--json", code=1))
    assert [each[0].rpartition(".")[2] for each in told["plain"]] == ["lr"]
    shard = json.loads(run(s3_server, "show", root, 1, "--json"))["shards"][0]["path"]
    client, where = s3_server.client(), {"Bucket": s3_server.bucket, "Key": f"{root.split('/', 3)[3]}/{shard}"}
    body = bytearray(client.get_object(**where)["Body"].read())
    body[len(body) // 2] ^= 1
    client.put_object(**where, Body=bytes(body))
    found = json.loads(run(s3_server, "verify", root, "--json", code=1))
    assert [(each["step"], each["intact"]) for each in found] == [(1, False), (2, True), (2, True)]
    assert shard in found[0]["problems"][0]


def test_a_live_job_on_s3_is_looked_at_saved_and_stopped_by_its_run_root(s3_server, run_root, tmp_path):
    command = [
        sys.executable, "-m", "dcpsvc.demo.train", f"--root={run_root}", f"--nvme={tmp_path / 'nvme'}",
        "--parallel=none", "--steps=1000000", "--every=1000000",
    ]  # fmt: skip
    environ = {**os.environ, "DCPSVC_DEMO_STORAGE_OPTIONS": json.dumps(s3_server.storage_options)}
    with (tmp_path / "output").open("w") as output, subprocess.Popen(command, env=environ, stderr=output) as job:
        try:
            await_first_step(s3_server, run_root, job)
            (rank,) = json.loads(run(s3_server, "status", run_root, "--json"))
            saved = json.loads(run(s3_server, "save", run_root, "--timeout=60", "--json"))
            stopped = json.loads(run(s3_server, "stop", run_root, "--timeout=60", "--json"))
            assert job.wait(60) == 0, (tmp_path / "output").read_text()
        finally:
            job.kill()
    assert rank["root"] == run_root
    assert (saved["state"], stopped["state"]) == ("committed", "committed")
    listed = json.loads(run(s3_server, "ls", run_root, "--json"))
    assert [row["step"] for row in listed] == [saved["step"], stopped["step"]]
    run(s3_server, "status", run_root, code=4)


def await_first_step(server: Server, root: str, job: subprocess.Popen[bytes]) -> None:
    asked = [PROGRAM, "status", root, "--json", *options_of(server)]
    deadline = time.monotonic() + 90
    while (done := subprocess.run(asked, capture_output=True, check=False, timeout=60)).returncode or not json.loads(
        done.stdout
    )[0].get("step"):
        assert job.poll() is None
        assert time.monotonic() < deadline, done.stderr


def test_a_run_on_s3_is_listed_verified_compared_fetched_edited_and_reported(root, s3_server, tmp_path):
    first, second = json.loads(run(s3_server, "ls", root, "--json"))
    assert (first["metrics"], second["state"]) == ({"loss": 2.0}, "committed")
    assert "intact" in run(s3_server, "verify", root)
    assert "2 tensors are the same" in run(s3_server, "diff", root, 1, 2, "--values")
    assert json.loads(run(s3_server, "du", root, "--json"))["kinds"]["debris"] == 0
    run(s3_server, "fetch", root, 2, tmp_path / "copy")
    assert dcpsvc.load(tmp_path / "copy", {"model": torch.nn.Linear(1000, 300)}) == 2
    assert "0.5 -> 0.25" in run(s3_server, "edit", root, 2, "--set", "optim.lr=0.25")
    assert "made" in run(s3_server, "show", root, 2)
    run(s3_server, "promote", root, 2, f"{root}-next")
    assert [each["step"] for each in json.loads(run(s3_server, "ls", f"{root}-next", "--json"))] == [2]
    run(s3_server, "report", root, "--output", tmp_path / "report.html")
    assert '"outcome":["committed","committed"]' in (tmp_path / "report.html").read_text()


def test_the_doctor_examines_a_bucket_and_leaves_nothing_in_it(s3_server, tmp_path):
    url = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}/new"
    found = json.loads(run(s3_server, "doctor", url, "--local", tmp_path / "local", "--size", "4MiB", "--json"))
    verdicts = {finding["name"]: finding["verdict"] for finding in found["findings"]}
    for name in ("permissions", "listings", "save and commit", "verify", "load", "delete"):
        assert verdicts[name] == "ok", found
    assert open_store(url, s3_server.storage_options).list("") == []


def test_wrong_credentials_are_named_by_the_doctor(s3_server, tmp_path):
    url = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}/new"
    wrong = s3_server._replace(secret_key=s3_server.secret_key[::-1])
    found = json.loads(run(wrong, "doctor", url, "--local", tmp_path / "local", "--size", "1MiB", "--json", code=1))
    (bad,) = [finding for finding in found["findings"] if finding["name"] == "permissions"]
    assert bad["verdict"] == "fail"
    assert "AWS_ACCESS_KEY_ID" in bad["remedy"]


def test_gc_on_s3_removes_what_need_not_stay_and_what_dead_writers_left_half_sent(root, s3_server, tmp_path):
    store = open_store(root, s3_server.storage_options)
    first, second = discover.committed(store)
    client, prefix = s3_server.client(), root.removeprefix(f"s3://{s3_server.bucket}/")
    client.create_multipart_upload(Bucket=s3_server.bucket, Key=f"{prefix}/data/dead")
    torn = first.epoch.attempt(1, 5)
    store.put(torn.shard(0), b"half")
    store.put("layouts/" + "ab" * 16 + ".json", b"{}")
    arguments = (root, "--local", tmp_path / "local", "--keep", "latest:1", "--json")
    young = json.loads(run(s3_server, "gc", "--dry-run", *arguments))
    assert ([one["step"] for one in young["remove"]], young["unfinished"]) == ([1], 0)
    threading.Event().wait(1.1)  # the server's clock counts in seconds
    found = json.loads(run(s3_server, "gc", "--older-than", 0, "--dry-run", *arguments))
    assert sorted(one["kind"] for one in found["remove"]) == ["attempt", "checkpoint", "layout"]
    assert found["unfinished"] == 1
    done = json.loads(run(s3_server, "gc", "--older-than", 0, *arguments))
    assert (done["nbytes"], done["held"]) == (found["nbytes"], [])
    assert discover.committed(store) == [second]
    assert {keys.attempt_below(entry.key) for entry in store.list("data/")} == {second}
    assert not client.list_multipart_uploads(Bucket=s3_server.bucket, Prefix=prefix).get("Uploads")
    before = store.list("")
    assert json.loads(run(s3_server, "gc", "--older-than", 0, *arguments))["remove"] == []
    assert store.list("") == before
    run(s3_server, "verify", root)


def test_checkpoints_are_copied_from_s3_to_s3_and_to_a_disk_and_back(root, s3_server, tmp_path):
    run(s3_server, "cp", root, f"{root}-mirror")
    run(s3_server, "cp", f"{root}-mirror", tmp_path / "disk")
    run(s3_server, "cp", tmp_path / "disk", f"{root}-back", 2)
    run(s3_server, "verify", f"{root}-back")
    assert [one["step"] for one in json.loads(run(s3_server, "ls", f"{root}-back", "--json"))] == [2]
    copied = json.loads(run(s3_server, "cp", root, f"{root}-mirror", "--json"))
    assert all(one["found_nbytes"] == one["nbytes"] for one in copied)
    state = {"model": torch.nn.Linear(1000, 300)}
    assert dcpsvc.load(f"{root}-back", state, storage_options=s3_server.storage_options) == 2


def test_an_object_on_s3_has_a_date(root, s3_server):
    date = written_s(open_store(root, s3_server.storage_options), "run.json")
    assert date is not None
    assert abs(date - time.time()) < 3600
