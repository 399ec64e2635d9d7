"""A real S3 server for these tests: Ceph's RADOS Gateway, fetched once and started for the session.

``DCPSVC_TEST_S3`` (an endpoint URL) with ``DCPSVC_TEST_S3_KEY`` and ``DCPSVC_TEST_S3_SECRET`` names a server of your
own instead; it gets a bucket that is removed at the end. ``DCPSVC_CEPH_ROOT`` says where Ceph is kept.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
pytest.register_assert_rewrite("store_contract")

from tests.s3.spoiling import Proxy  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SCRIPTS = Path(__file__).parent / "ceph"
PORTS_BESIDE = (0, 1, 100, 101, 102, 103)


class Server(NamedTuple):
    """A running S3 server, and an empty bucket on it."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str
    data: Path | None = None
    """Where our own Ceph keeps its data; None for somebody else's server."""

    @property
    def storage_options(self) -> dict[str, Any]:
        return {
            "endpoint_url": self.endpoint,
            "key": self.access_key,
            "secret": self.secret_key,
            "client_kwargs": {"region_name": "us-east-1"},
        }

    def client(self) -> Any:
        """A client that is not ours: what a stranger sees."""
        from botocore.session import Session

        return Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        )

    def start(self) -> None:
        """Start our own Ceph, with the data it has."""
        assert self.data
        run("start.sh", str(ceph_root()), str(self.data), self.endpoint.rpartition(":")[2])

    def stop(self, signal: str = "TERM") -> None:
        assert self.data
        run("stop.sh", str(self.data), SIG=signal)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bucket = f"dcpsvc-{uuid.uuid4().hex}"
    if endpoint := os.environ.get("DCPSVC_TEST_S3"):
        key, secret = os.environ["DCPSVC_TEST_S3_KEY"], os.environ["DCPSVC_TEST_S3_SECRET"]
        server = Server(endpoint, key, secret, bucket)
        server.client().create_bucket(Bucket=bucket)
        yield server
        empty_and_remove(server)
        return
    fetch()
    data = tmp_path_factory.mktemp("ceph")
    server = Server(f"http://127.0.0.1:{free_port()}", "testkey", "testsecretkey0123", bucket, data)
    try:
        server.start()
        server.client().create_bucket(Bucket=bucket)
        yield server
    finally:
        # Nothing here is worth an orderly exit, which takes half a minute.
        server.stop("KILL")
        # 20 GB of a sparse file; pytest would keep three of them.
        shutil.rmtree(data)


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


def ceph_root() -> Path:
    return Path(os.environ.get("DCPSVC_CEPH_ROOT") or Path.home() / ".cache" / "dcpsvc-tests" / "ceph")


def fetch() -> None:
    try:
        run("fetch.sh", str(ceph_root()))
    except (subprocess.SubprocessError, OSError) as err:
        reason = str(getattr(err, "stderr", None) or err).strip().splitlines()[-1:]
        pytest.skip(f"Ceph cannot be fetched: {''.join(reason)}; set DCPSVC_TEST_S3 to use another server")


def run(script: str, *args: str, **env: str) -> None:
    # stderr goes to a pipe that ends with the script: the daemons it leaves behind have closed theirs.
    subprocess.run(
        ["/bin/bash", str(SCRIPTS / script), *args],
        check=True,
        timeout=240,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    """The first of a group of ports that are free now, below those the kernel hands out by itself."""
    for _ in range(100):
        port = random.randrange(20_000, 32_000)
        try:
            for beside in PORTS_BESIDE:
                socket.create_server(("127.0.0.1", port + beside)).close()
        except OSError:
            continue
        return port
    raise RuntimeError("no free ports below 32000")
