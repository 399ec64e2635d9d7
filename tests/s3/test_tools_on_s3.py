"""The tools on a real S3 server: what they tell of a run, and what they make of it, is what they do on a disk."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING

import pytest
import torch

import dcpsvc
from dcpsvc.format import keys
from dcpsvc.stages import discover
from dcpsvc.storage.base import written_s
from dcpsvc.storage.open import open_store

if TYPE_CHECKING:
    from pathlib import Path

    from tests.s3.servers import Server


pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]


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
    options = [
        part
        for key, value in server.storage_options.items()
        for part in ("--option", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    ]
    command = [sys.executable, "-m", "dcpsvc", name, *options, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    assert server.secret_key not in done.stdout + done.stderr
    return done.stdout


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
