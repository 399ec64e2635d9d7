"""A run root that cannot work is refused before step 1: what was tried, what is wrong, what to do, and no secret."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import uuid
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
import torch
from botocore.exceptions import ClientError

import dcpsvc
from dcpsvc.errors import RootError
from tests.s3 import spoiling as faults
from tests.s3.servers import error_code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.s3.servers import Server
    from tests.s3.spoiling import Proxy, Spoiler

    Refused = Callable[..., str]

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

SENTENCES = {
    "InvalidAccessKeyId": "does not know this access key",
    "SignatureDoesNotMatch": "secret key does not fit",  # a server that does not tell the two apart
}
SECRETS = ("testsecretkey0123", "wrong-secret-0123", "nobody-knows-me")


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """The sentence that a Checkpointer ends with instead of opening; nothing of it is on the way to a step."""

    def open_run(root: str, options: dict[str, Any]) -> str:
        with pytest.raises(RootError) as caught:
            dcpsvc.Checkpointer(root, {"w": torch.ones(3)}, local=tmp_path / "local", storage_options=options)
        told = str(caught.value)
        assert not [secret for secret in SECRETS if secret in told]
        assert told.startswith(f"{root}: ")
        return told

    return open_run


def test_wrong_credentials_are_told_apart(s3_server: Server, run_root: str, refused: Refused) -> None:
    options = s3_server.storage_options
    assert "secret key does not fit" in refused(run_root, {**options, "secret": "wrong-secret-0123"})
    told = refused(run_root, {**options, "key": "nobody-knows-me"})
    assert SENTENCES[s3_server.refusal(access_key="nobody-knows-me")] in told


def test_missing_credentials_say_where_to_put_them(
    s3_server: Server, run_root: str, refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    options = {name: value for name, value in s3_server.storage_options.items() if name not in {"key", "secret"}}
    assert "no credentials found; set them in storage_options or the environment" in refused(run_root, options)


def test_a_bucket_that_is_not_there_is_named_and_not_made(s3_server: Server, refused: Refused) -> None:
    told = refused("s3://dcpsvc-no-such-bucket/run", s3_server.storage_options)
    assert "there is no such bucket; it is never created for you" in told
    names = [bucket["Name"] for bucket in s3_server.client().list_buckets()["Buckets"]]
    assert "dcpsvc-no-such-bucket" not in names


@pytest.fixture
def denying(s3_server: Server) -> Iterator[Callable[[str], str]]:
    """A run root in a bucket whose policy forbids an action to everybody."""
    client, made = s3_server.client(), list[str]()

    def deny(action: str) -> str:
        bucket = f"dcpsvc-{uuid.uuid4().hex}"
        client.create_bucket(Bucket=bucket)
        made.append(bucket)
        where = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
        statement = {"Effect": "Deny", "Principal": "*", "Action": [action], "Resource": where}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        try:
            client.put_bucket_policy(Bucket=bucket, Policy=policy)
        except ClientError as err:
            if error_code(err) != "NotImplemented":
                raise
            pytest.skip("the server has no bucket policies")
        return f"s3://{bucket}/run"

    yield deny
    for bucket in made:
        with contextlib.suppress(ClientError):  # a server without policies
            client.delete_bucket_policy(Bucket=bucket)
        for item in client.list_objects_v2(Bucket=bucket).get("Contents", []):
            client.delete_object(Bucket=bucket, Key=item["Key"])
        client.delete_bucket(Bucket=bucket)


@pytest.mark.parametrize("action", ["s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"])
def test_a_right_that_is_missing_is_named_with_what_was_tried(
    s3_server: Server, denying: Callable[[str], str], refused: Refused, action: str
) -> None:
    told = refused(denying(action), s3_server.storage_options)
    assert "access denied" in told
    assert action in told
    assert "/run/" in told


def test_a_policy_that_forbids_overwriting_is_refused(
    run_root: str, options: dict[str, object], between: Proxy, refused: Refused
) -> None:
    def only_conditional(spoiler: Spoiler) -> None:
        allowed = spoiler.headers.get("If-None-Match")
        (faults.passes if allowed else faults.says(403, "AccessDenied"))(spoiler)

    between.spoil("^(PUT|POST)", only_conditional, 1000)
    told = refused(run_root, options)
    assert "no policy that forbids plain overwriting" in told
    assert "put s3://" in told


def test_an_endpoint_where_nobody_is_says_so(s3_server: Server, run_root: str, refused: Refused) -> None:
    options = {**s3_server.storage_options, "endpoint_url": "http://127.0.0.1:9"}
    assert "the endpoint cannot be reached; is endpoint_url right?" in refused(run_root, options)


def test_another_region_says_what_to_set(
    run_root: str, options: dict[str, object], between: Proxy, refused: Refused
) -> None:
    between.spoil("^", faults.says(400, "AuthorizationHeaderMalformed"), 1000)
    assert "the server expects another region; set region_name" in refused(run_root, options)


def test_a_clock_that_is_twenty_minutes_off_is_named(
    s3_server: Server, run_root: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twenty_minutes_ago(*, remove_tzinfo: bool = True) -> dt.datetime:
        now = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=20)
        return now.replace(tzinfo=None) if remove_tzinfo else now

    for name in ("botocore.auth", "botocore.crt.auth"):
        with contextlib.suppress(ImportError):  # its own signing, if awscrt is installed
            monkeypatch.setattr(import_module(name), "get_current_datetime", twenty_minutes_ago)
    assert "this machine's clock and the server's differ too much" in refused(run_root, s3_server.storage_options)


@pytest.mark.parametrize(
    ("root", "advice"),
    [
        ("s3:///run", "it names no bucket; write s3://bucket/prefix"),
        ("s4://bucket/run", "'s4' is not a known protocol; give a directory or s3://bucket/prefix"),
        ("https://bucket.s3.amazonaws.com/run", "give a directory or an object store's URL"),
    ],
    ids=["no bucket", "unknown protocol", "no place to write to"],
)
def test_a_url_that_names_no_place_says_what_to_write(refused: Refused, root: str, advice: str) -> None:
    assert advice in refused(root, {})


def test_a_run_root_that_is_a_file_is_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    assert "a file, not a folder; name a folder" in refused(str(path), {})
    assert path.read_text() == "x"


def test_a_run_root_that_is_an_object_is_refused_likewise_and_nothing_is_written(
    s3_server: Server, run_root: str, refused: Refused
) -> None:
    client, key = s3_server.client(), f"{run_root.partition(s3_server.bucket)[2].strip('/')}/file.txt"
    client.put_object(Bucket=s3_server.bucket, Key=key, Body=b"somebody's")
    assert "a file, not a folder; name a folder" in refused(f"{run_root}/file.txt", s3_server.storage_options)
    found = client.list_objects_v2(Bucket=s3_server.bucket, Prefix=key)["Contents"]
    assert [item["Key"] for item in found] == [key]
