"""Who only looks at a run root, or loads from it, hears what was tried and what is wrong as well, and no secret."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import torch

import dcpsvc
from dcpsvc.errors import RootError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.s3.servers import Server

    Look = Callable[[str, dict[str, Any]], str]

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

WRONG = "wrong-secret-0123"
NOWHERE = "http://127.0.0.1:9"


def load(root: str, options: dict[str, Any]) -> str:
    state = {"w": torch.zeros(3)}
    with pytest.raises((RootError, StoreError)) as caught:
        dcpsvc.load(root, state, storage_options=options)
    assert not state["w"].any()
    return str(caught.value)


def latest(root: str, options: dict[str, Any]) -> str:
    with pytest.raises((RootError, StoreError)) as caught:
        dcpsvc.latest(root, storage_options=options)
    return str(caught.value)


def list_checkpoints(root: str, options: dict[str, Any]) -> str:
    with pytest.raises((RootError, StoreError)) as caught:
        dcpsvc.list_checkpoints(root, storage_options=options)
    return str(caught.value)


def ran(*argv: str, options: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    given = [
        part for key, value in options.items()
        for part in ("-o", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    ]  # fmt: skip
    command = [sys.executable, "-m", "dcpsvc", *argv, *given]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def command(name: str, *more: str, code: int = 3) -> Look:
    def look(root: str, options: dict[str, Any]) -> str:
        done = ran(name, root, *more, options=options)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert code == 0 or done.stdout == ""
        return done.stderr

    return look


LOOKS = {
    "load": load, "latest": latest, "list": list_checkpoints,
    "ls": command("ls"), "verify": command("verify"), "gc": command("gc", "--dry-run", "--keep", "latest:1"),
}  # fmt: skip


@pytest.fixture(params=LOOKS)
def look(request: pytest.FixtureRequest, s3_server: Server) -> Look:
    """What it says to whoever looks; never a secret."""

    def say(root: str, options: dict[str, Any]) -> str:
        told = LOOKS[request.param](root, options)
        assert WRONG not in told
        assert s3_server.secret_key not in told
        return told

    return say


def test_wrong_credentials_are_named(s3_server: Server, run_root: str, look: Look) -> None:
    told = look(run_root, {**s3_server.storage_options, "secret": WRONG})
    assert "the secret key does not fit the access key" in told
    assert f"get {run_root}/run.json" in told or f"list {run_root}/manifests/" in told


def test_a_bucket_that_is_not_there_is_named(s3_server: Server, look: Look) -> None:
    told = look("s3://dcpsvc-no-such-bucket/run", s3_server.storage_options)
    assert "there is no such bucket" in told
    assert re.search("s3://dcpsvc-no-such-bucket/run/(run.json|manifests/)", told)
    assert "dcpsvc: " not in told or "Create the bucket, or correct its name, or the endpoint" in told  # of a command


def test_an_endpoint_where_nobody_is_is_named(s3_server: Server, run_root: str, look: Look) -> None:
    told = look(run_root, {**s3_server.storage_options, "endpoint_url": NOWHERE})
    assert "the endpoint cannot be reached; is endpoint_url right?" in told


def test_a_place_where_no_run_is_says_so(s3_server: Server, run_root: str, look: Look) -> None:
    assert f"{run_root}: no run is stored here" in look(run_root, s3_server.storage_options)


def test_a_place_that_is_an_object_is_called_a_file(s3_server: Server, run_root: str, look: Look) -> None:
    key = f"{run_root.partition(s3_server.bucket)[2].strip('/')}/file.txt"
    s3_server.client().put_object(Bucket=s3_server.bucket, Key=key, Body=b"somebody's")
    told = look(f"{run_root}/file.txt", s3_server.storage_options)
    assert f"{run_root}/file.txt: a file, not a folder" in told


def test_a_copy_and_an_import_to_an_object_are_refused_and_the_doctor_says_why(
    s3_server: Server, run_root: str, tmp_path: Path
) -> None:
    options, client = s3_server.storage_options, s3_server.client()
    with dcpsvc.Checkpointer(tmp_path / "run", {"w": torch.ones(3)}, local=tmp_path / "local") as ckpt:
        ckpt.save(1).wait(60)
    torch.save({"w": torch.ones(3)}, tmp_path / "weights.pt")
    key = f"{run_root.partition(s3_server.bucket)[2].strip('/')}/file.txt"
    client.put_object(Bucket=s3_server.bucket, Key=key, Body=b"somebody's")
    root, folder, weights = f"{run_root}/file.txt", str(tmp_path / "run"), str(tmp_path / "weights.pt")
    local = ("--local", str(tmp_path / "doctor"))
    for argv, code in ((("cp", folder, root), 3), (("import", weights, root), 3), (("doctor", root, *local), 1)):
        done = ran(*argv, options=options)
        assert "a file, not a folder" in done.stdout + done.stderr, done
        assert done.returncode == code
    found = client.list_objects_v2(Bucket=s3_server.bucket, Prefix=key)["Contents"]
    assert [item["Key"] for item in found] == [key]


def test_a_run_goes_on_though_an_object_has_got_its_name_and_neither_disturbs_the_other(
    s3_server: Server, tmp_path: Path
) -> None:
    key, client, options = f"{uuid.uuid4().hex}/run", s3_server.client(), s3_server.storage_options
    root = f"s3://{s3_server.bucket}/{key}"
    dcpsvc.Checkpointer(root, {"w": torch.ones(3)}, local=tmp_path, storage_options=options).close()
    client.put_object(Bucket=s3_server.bucket, Key=key, Body=b"somebody's")
    with dcpsvc.Checkpointer(root, {"w": torch.ones(3)}, local=tmp_path, storage_options=options) as ckpt:
        assert ckpt.resume() == 0
        ckpt.save(1).wait(60)
    state = {"w": torch.zeros(3)}
    assert dcpsvc.load(root, state, storage_options=options) == 1
    assert state["w"].all()
    command("gc", "--older-than", "0", "--keep", "latest:1", code=0)(root, options)
    assert client.get_object(Bucket=s3_server.bucket, Key=key)["Body"].read() == b"somebody's"
