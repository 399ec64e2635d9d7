"""A real S3 server for a benchmark: Ceph's gateway as the tests start it, or one that is named."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
import uuid
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "tests" / "s3" / "ceph"
KEY, SECRET = "testkey", "testsecretkey0123"
_BESIDE = (0, 1, *range(100, 104))
_data = []


@contextlib.contextmanager
def bucket(endpoint=None, parent=None):
    """Storage options for s3fs, and the name of an empty bucket; a server of our own ends with the context."""
    if endpoint:
        options = _options(endpoint, os.environ["DCPSVC_TEST_S3_KEY"], os.environ["DCPSVC_TEST_S3_SECRET"])
        yield options, _make_bucket(options)
        return
    root = Path(os.environ.get("DCPSVC_CEPH_ROOT") or Path.home() / ".cache" / "dcpsvc-tests" / "ceph")
    data = tempfile.mkdtemp(prefix="ceph-", dir=parent)
    _data.append(data)
    _run("fetch.sh", str(root))
    port = _free_port()
    try:
        _run("start.sh", str(root), data, str(port))
        options = _options(f"http://127.0.0.1:{port}", KEY, SECRET)
        yield options, _make_bucket(options)
    finally:
        _run("stop.sh", data, SIG="KILL")
        _data.remove(data)
        shutil.rmtree(data, ignore_errors=True)


def processes():
    """Ids of the daemons that were started here."""
    return [int(path.read_text()) for data in _data for path in Path(data, "run").glob("*.pid")]


def client(options):
    """A plain botocore client."""
    from botocore.session import Session

    return Session().create_client(
        "s3", region_name="us-east-1", endpoint_url=options["endpoint_url"],
        aws_access_key_id=options["key"], aws_secret_access_key=options["secret"],
    )  # fmt: skip


def _options(endpoint, key, secret):
    return {"endpoint_url": endpoint, "key": key, "secret": secret, "client_kwargs": {"region_name": "us-east-1"}}


def _make_bucket(options):
    name = f"bench-{uuid.uuid4().hex[:12]}"
    client(options).create_bucket(Bucket=name)
    return name


def _run(script, *arguments, **env):
    subprocess.run(
        ["/bin/bash", str(SCRIPTS / script), *arguments], check=True, timeout=240, env={**os.environ, **env},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def _free_port():
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError):
            for beside in _BESIDE:
                socket.create_server(("127.0.0.1", port + beside)).close()
            return port
