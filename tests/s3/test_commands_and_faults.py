"""Every command beside every mistake: what is wrong, where, what to do, the exit code; and nothing is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from botocore.exceptions import ClientError
from safetensors.torch import save_file

import dcpsvc
from dcpsvc.cli import cli
from dcpsvc.storage.open import open_store
from tests.s3.commands import ARGUMENTS, CODES, options_of
from tests.s3.servers import error_code
from tests.unit.every_command import Said, call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.s3.servers import Server

pytestmark = [pytest.mark.s3, pytest.mark.timeout(120)]

WRONG_KEY, WRONG_SECRET = "nobody-knows-me", "wrong-secret-0123"
NO_BUCKET = "dcpsvc-no-such-bucket"
NOWHERE = "http://127.0.0.1:9"
CREDENTIALS = "Check the credentials (AWS_ACCESS_KEY_ID"
BUCKET = "Create the bucket, or correct its name, or the endpoint"


class Mistake(NamedTuple):
    """A mistake, and what is to be said of it."""

    error: str
    said: str
    remedy: str
    code: int = 3
    options: dict[str, str] | None = None
    bucket: str = ""
    key: str = ""
    """Of the run; empty: the one that is there."""


MISTAKES = {
    "wrong secret": Mistake(
        "StoreAccessError", "secret key does not fit", CREDENTIALS, options={"secret": WRONG_SECRET}
    ),
    "wrong key": Mistake("StoreAccessError", "access key", CREDENTIALS, options={"key": WRONG_KEY}),
    "no bucket": Mistake("NoBucketError", "there is no such bucket", BUCKET, bucket=NO_BUCKET),
    "no run": Mistake("NoRunError", "no run is stored here", "A run root holds run.json", key="-nothing/here"),
}
BESIDE = [
    (name, mistake)
    for name in ARGUMENTS
    for mistake in MISTAKES
    if mistake != "no run" or name not in {"doctor", "import"}  # for these a place without a run is a good one
]
WRITING = {"pin", "edit", "promote", "gc", "cp", "import"}
"""Commands that write below what they are given."""

A_STEP: dict[str, tuple[object, ...]] = {
    "show": ("ROOT", "STEP"),
    "verify": ("ROOT", "STEP"),
    "diff": ("ROOT", 1, "STEP"),
    "pin": ("ROOT", "STEP"),
    "unpin": ("ROOT", "STEP"),
    "edit": ("ROOT", "STEP", "--set", "optim.lr=0.25", "--dry-run"),
    "promote": ("ROOT", "STEP", "ELSEWHERE", "--dry-run"),
    "gc": ("ROOT", "--remove", "STEP", "--force-last", "--dry-run"),
    "fetch": ("ROOT", "STEP", "DIR"),
    "cp": ("ROOT", "DISK", "STEP"),
    "export": ("ROOT", "STEP", "DIR", "--format", "hf"),
}
"""Those that are given a step of ROOT."""
ONE_OF_SEVERAL = {"pin", "unpin", "gc"}
"""Those that do not choose between attempts."""


class Run(NamedTuple):
    """A run, in a bucket of its own."""

    server: Server
    url: str

    def options(self, **other: str) -> list[str]:
        return options_of(
            self.server._replace(
                secret_key=other.get("secret", self.server.secret_key),
                access_key=other.get("key", self.server.access_key),
                endpoint=other.get("endpoint_url", self.server.endpoint),
            )
        )

    def keys(self) -> list[str]:
        """Everything in the bucket."""
        return [entry.key for entry in open_store(self.url.rpartition("/")[0], self.server.storage_options).list("")]


@pytest.fixture(scope="module")
def a_run(s3_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Steps 1, 2 and 3, and a second attempt at 3."""
    bucket, client = f"dcpsvc-{uuid.uuid4().hex}", s3_server.client()
    client.create_bucket(Bucket=bucket)
    run = Run(s3_server, f"s3://{bucket}/runs/exp42")
    model = torch.nn.Linear(100, 30)
    state = {"model": model, "optim": torch.optim.SGD(model.parameters(), lr=0.5)}
    folder = tmp_path_factory.mktemp("run")
    with dcpsvc.Checkpointer(
        run.url, state, local=folder / "local", storage_options=s3_server.storage_options, run_log=True
    ) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, metrics={"loss": 2.0}).wait(60)
    done = call("edit", run.url, 3, "--set", "optim.lr=0.25", *run.options())
    assert done.code == 0, done
    yield run
    for item in client.list_objects_v2(Bucket=bucket)["Contents"]:
        client.delete_object(Bucket=bucket, Key=item["Key"])
    client.delete_bucket(Bucket=bucket)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What can be imported."""
    path = tmp_path_factory.mktemp("folder")
    save_file({"weight": torch.ones(3)}, path / "model.safetensors")
    return path


@pytest.fixture
def given(a_run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The arguments of a command, with places in them; nothing it does lands outside this test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def fill(arguments: Sequence[object], root: str = a_run.url, **more: object) -> list[str]:
        places = {
            "ROOT": root, "ELSEWHERE": f"{root}-next", "FILE": tmp_path / "page.html", "DIR": tmp_path / "dir",
            "FOLDER": folder, "DISK": tmp_path / "disk", **more,
        }  # fmt: skip
        return [str(places.get(str(each), each)) for each in arguments]

    return fill


def checked(said: Said) -> Said:
    """Whatever a command says, it is for people, or a document, and no secret."""
    told = said.out + said.err
    assert "Traceback" not in told
    assert not [secret for secret in ("testsecretkey0123", WRONG_SECRET) if secret in told]
    return said


def without_chance(said: str) -> str:
    """Without the names that are made up anew in each call."""
    return re.sub(r"\b[0-9a-f]{8}\b", "", said)


def told(*words: str) -> tuple[Said, dict[str, Any]]:
    """What a command that fails says to people, and as JSON: the same."""
    text, document = checked(call(*words)), checked(call(*words, "--json"))
    said: dict[str, Any] = json.loads(document.err.splitlines()[-1])
    assert (text.out, document.out) == ("", "")
    assert text.code == document.code == said["exit_code"]
    assert without_chance(said["message"]) in without_chance(text.err)
    assert said["remedy"] is None or said["remedy"] in text.err
    return text, said


@pytest.mark.parametrize(("name", "mistake"), BESIDE)
def test_a_mistake_is_told_with_what_is_wrong_where_and_what_to_do(name, mistake, a_run, given):
    it, before = MISTAKES[mistake], a_run.keys()
    root = a_run.url.replace(a_run.url.split("/")[2], it.bucket or a_run.url.split("/")[2]) + it.key
    words = [name, *given(ARGUMENTS[name], root), *a_run.options(**(it.options or {}))]
    if name == "doctor":
        check_doctor(words, it)
    else:
        text, said = told(*words)
        assert (said["error"], text.code) == (it.error, it.code)
        assert it.said in said["message"]
        assert said["where"].startswith(root)
        assert said["remedy"].startswith(it.remedy)
        assert len(text.err.splitlines()) == 2, text.err
    assert a_run.keys() == before


def check_doctor(words: Sequence[str], it: Mistake) -> None:
    """What it finds is its answer."""
    document = checked(call(*words, "--json"))
    bad = [each for each in json.loads(document.out)["findings"] if each["verdict"] == "fail"]
    assert document.code == 1
    assert it.said in bad[0]["found"]
    assert bad[0]["remedy"].casefold().startswith(it.remedy.casefold())


@pytest.fixture(scope="module")
def read_only(a_run: Run) -> Iterator[None]:
    """Nobody may write there, for a while."""
    client, bucket = a_run.server.client(), a_run.url.split("/")[2]
    where = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    actions = ["s3:PutObject", "s3:DeleteObject"]
    statement = {"Effect": "Deny", "Principal": "*", "Action": actions, "Resource": where}
    try:
        client.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
    except ClientError as err:
        if error_code(err) != "NotImplemented":
            raise
        pytest.skip("the server has no bucket policies")
    yield
    client.delete_bucket_policy(Bucket=bucket)


@pytest.mark.usefixtures("read_only")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_who_may_only_read_can_look_and_copy_from_there_and_is_told_which_right_is_missing(name, a_run, given):
    before = a_run.keys()
    words = [name, *given(ARGUMENTS[name]), *a_run.options()]
    if name == "doctor":
        check_doctor(words, Mistake("", "s3:PutObject", CREDENTIALS))
    elif name in WRITING:
        text, said = told(*words)
        assert (said["error"], text.code) == ("StoreAccessError", 3)
        assert "s3:PutObject" in said["message"]
        assert said["where"].startswith(a_run.url)
        assert said["remedy"].startswith(CREDENTIALS)
    else:
        assert checked(call(*words, "--json")).code == CODES.get(name, 0)
    assert a_run.keys() == before


def test_every_command_that_is_given_a_step_is_tried():
    takes = {name for name in ARGUMENTS if {"step", "steps", "a"} & {each.name for each in cli.commands[name].params}}
    assert takes == {*A_STEP, "import"}  # which makes the step


@pytest.mark.parametrize("name", A_STEP)
def test_a_step_that_is_not_there_is_told_with_those_that_are_by(name, a_run, given):
    text, said = told(name, *given(A_STEP[name], STEP=7), *a_run.options())
    assert (said["error"], text.code) == ("NoSuchStepError", 1)
    assert (said["step"], said["available"], said["root"]) == (7, [1, 2, 3], a_run.url)
    assert said["intact"] in said["message"]
    assert said["remedy"] == "dcpsvc ls ROOT shows what is there."


@pytest.mark.parametrize("name", A_STEP)
def test_of_several_attempts_the_newest_is_read_which_is_said_and_none_is_changed_unnamed_by(name, a_run, given):
    before = a_run.keys()
    words = [name, *given(A_STEP[name], STEP=3), *a_run.options()]
    attempts = [row["attempt"] for row in json.loads(call("ls", a_run.url, "--json", *a_run.options()).out)][2:]
    said = checked(call(*words, "--json"))
    if name in ONE_OF_SEVERAL:
        text, _ = told(*words)
        assert text.code == 2
        assert all(each in text.err for each in ("--attempt", *attempts))
    else:
        assert (said.code, json.loads(said.out) is not None) == (1 if name == "diff" else 0, True)
        can_name = any("--attempt" in each.opts for each in cli.commands[name].params)
        assert f"taking {attempts[-1]}" in said.err or name == "verify"  # which reads all of them
        assert ("(--attempt" in said.err) == can_name
    assert a_run.keys() == before


def test_a_rule_about_a_metric_that_nobody_has_names_those_that_are_there(a_run):
    text, _ = told("gc", a_run.url, "--keep", "best:1:nobody:min", "--dry-run", *a_run.options())
    assert text.code == 2
    assert "'nobody'" in text.err
    assert "loss" in text.err


def test_an_endpoint_where_nobody_is_is_told_by_every_command(a_run, given):
    def ran(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dcpsvc", name, *given(ARGUMENTS[name]), "--json"]
        options = a_run.options(endpoint_url=NOWHERE)
        return subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=100)

    names = [name for name in ARGUMENTS if name != "doctor"]
    with ThreadPoolExecutor(len(names)) as side_by_side:  # each tries for some seconds
        for name, done in zip(names, side_by_side.map(ran, names), strict=True):
            checked(Said(done.returncode, done.stdout, done.stderr))
            said = json.loads(done.stderr.splitlines()[-1])
            assert (name, said["error"], said["transient"]) == (name, "StoreUnavailableError", True)
            assert (done.returncode, done.stdout) == (3, "")
            assert "the endpoint cannot be reached" in said["message"]
            assert "(tried 5 times in" in said["message"]
            assert "the endpoint (AWS_ENDPOINT_URL" in said["remedy"]
