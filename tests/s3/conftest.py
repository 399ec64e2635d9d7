"""A real S3 server for these tests, started for the session: `servers.py` says which one, and how to name another."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
pytest.register_assert_rewrite("store_contract")

from tests.s3.servers import CHOSEN, KINDS, Kind, Server, UnavailableError, choose, fetch, free_port  # noqa: E402
from tests.s3.spoiling import Proxy  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _pytest.terminal import TerminalReporter

SERVED_BY = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Server]:
    if endpoint := os.environ.get("DCPSVC_TEST_S3"):
        key, secret = os.environ["DCPSVC_TEST_S3_KEY"], os.environ["DCPSVC_TEST_S3_SECRET"]
        server = Server(endpoint, key, secret, f"dcpsvc-{uuid.uuid4().hex}")
        server.client().create_bucket(Bucket=server.bucket)
        yield server
        empty_and_remove(server)
        return
    kind, reason = choose()
    if kind is None:
        pytestconfig.stash[SERVED_BY] = reason = f"NO S3 TEST HAS RUN: {reason}; DCPSVC_TEST_S3 names another server"
        # Nobody reads what a build skips: there, and for who asked for a certain server, it is a failure.
        (pytest.fail if os.environ.get("CI") or os.environ.get(CHOSEN) else pytest.skip)(reason)
    pytestconfig.stash[SERVED_BY] = f"S3 tests ran on {kind.name}" + (f", because {reason}" if reason else "")
    with started(kind, tmp_path_factory.mktemp(kind.name)) as server:
        yield server


@pytest.fixture(scope="session")
def swift(s3_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of which several may win a conditional create, whichever the other tests run on."""
    if s3_server.is_swift:
        yield s3_server
        return
    try:
        fetch(KINDS["swift"])
    except UnavailableError as err:
        pytest.skip(f"no server without an atomic create: {err}")
    with started(KINDS["swift"], tmp_path_factory.mktemp("swift")) as server:
        yield server


@contextlib.contextmanager
def started(kind: Kind, data: Path) -> Iterator[Server]:
    """Our own server, with an empty bucket; it ends with the context, and so do its data."""
    name = f"dcpsvc-{uuid.uuid4().hex}"
    server = Server(f"http://127.0.0.1:{free_port()}", kind.access_key, "testsecretkey0123", name, kind, data)
    try:
        server.start()
        server.client().create_bucket(Bucket=name)
        yield server
    finally:
        # Nothing here is worth an orderly exit, which takes half a minute.
        server.stop("KILL")
        # Ceph's is 20 GB of a sparse file; pytest would keep three of them.
        shutil.rmtree(data)


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    """Say which server it was: "passed" alone does not tell that one."""
    if served := config.stash.get(SERVED_BY, ""):
        bad = served.startswith("NO S3")
        terminalreporter.write_sep("=", served, red=bad, bold=bad)


@pytest.fixture
def between(s3_server: Server) -> Iterator[Proxy]:
    with Proxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def run_root(s3_server: Server) -> str:
    return f"s3://{s3_server.bucket}/{uuid.uuid4().hex}/run"


@pytest.fixture
def options(s3_server: Server, between: Proxy) -> dict[str, object]:
    return {
        **s3_server.storage_options,
        "endpoint_url": between.endpoint,
        "config_kwargs": {"read_timeout": 2, "connect_timeout": 2},
    }


@pytest.fixture
def truth(s3_server: Server, run_root: str) -> Callable[[], tuple[dict[str, bytes], int]]:
    """What a stranger sees below the run root: objects, and unfinished uploads."""
    client, prefix = s3_server.client(), run_root.removeprefix(f"s3://{s3_server.bucket}/") + "/"

    def look() -> tuple[dict[str, bytes], int]:
        found = client.list_objects_v2(Bucket=s3_server.bucket, Prefix=prefix).get("Contents", [])
        objects = {
            item["Key"].removeprefix(prefix): client.get_object(Bucket=s3_server.bucket, Key=item["Key"])["Body"].read()
            for item in found
        }
        uploads = client.list_multipart_uploads(Bucket=s3_server.bucket, Prefix=prefix).get("Uploads", [])
        return objects, len(uploads)

    return look


def empty_and_remove(server: Server) -> None:
    client = server.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=server.bucket):
        for item in page.get("Contents", []):
            client.delete_object(Bucket=server.bucket, Key=item["Key"])
    for upload in client.list_multipart_uploads(Bucket=server.bucket).get("Uploads", []):
        client.abort_multipart_upload(Bucket=server.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    client.delete_bucket(Bucket=server.bucket)
