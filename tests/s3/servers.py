"""Real S3 servers that a test session starts: Ceph's RADOS Gateway, or OpenStack Swift where that cannot be had.

``DCPSVC_TEST_S3_SERVER=ceph`` or ``swift`` takes that one or none. ``DCPSVC_CEPH_ROOT`` and ``DCPSVC_SWIFT_VENV`` say
where they are kept; both are fetched once. ``DCPSVC_TEST_S3`` (an endpoint URL) with ``DCPSVC_TEST_S3_KEY`` and
``DCPSVC_TEST_S3_SECRET`` names a server of your own instead; it gets a bucket that is removed at the end.
"""

from __future__ import annotations

import functools
import os
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from botocore.exceptions import ClientError

SCRIPTS = Path(__file__).parent
CACHE = Path.home() / ".cache" / "dcpsvc-tests"
PORTS_BESIDE = (0, 1, 2, 3, 100, 101, 102, 103)
CHOSEN = "DCPSVC_TEST_S3_SERVER"
RACERS, RACES = 16, 12
LOST = {"PreconditionFailed", "ConditionalRequestConflict"}
"""What a client hears that has not won."""


class UnavailableError(Exception):
    """A server cannot be had here."""


class Kind(NamedTuple):
    """A program that serves S3, as our scripts fetch, start and stop it."""

    name: str
    variable: str
    place: Path
    access_key: str

    @property
    def home(self) -> Path:
        """Where it is unpacked."""
        return Path(os.environ.get(self.variable) or self.place)

    def run(self, script: str, *args: str, **env: str) -> None:
        # stderr goes to a pipe that ends with the script: the daemons it leaves behind have closed theirs.
        subprocess.run(
            ["/bin/bash", str(SCRIPTS / self.name / script), *args],
            check=True,
            timeout=240,
            env={**os.environ, "PYTHON": sys.executable, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )


KINDS = {
    kind.name: kind
    for kind in (
        Kind("ceph", "DCPSVC_CEPH_ROOT", CACHE / "ceph", "testkey"),
        Kind("swift", "DCPSVC_SWIFT_VENV", CACHE / "swift", "test:tester"),
    )
}


class Server(NamedTuple):
    """A running S3 server, and an empty bucket on it."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str
    kind: Kind | None = None
    """None for somebody else's server."""
    data: Path | None = None
    """Where our own server keeps its data."""

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
        """Start our own server, with the data it has."""
        assert self.kind
        self.kind.run("start.sh", str(self.kind.home), str(self.data), self.endpoint.rpartition(":")[2])

    def stop(self, signal: str = "TERM") -> None:
        assert self.kind
        self.kind.run("stop.sh", str(self.data), SIG=signal)

    @property
    def is_swift(self) -> bool:
        return self.kind is not None and self.kind.name == "swift"

    def refusal(self, **keys: str) -> str:
        """What it calls the mistake of a client with other keys."""
        try:
            self._replace(**keys).client().list_objects_v2(Bucket=self.bucket)
        except ClientError as err:
            return error_code(err)
        raise AssertionError("no mistake")

    def skip_where_several_win(self) -> None:
        """Skip if plain clients that race with conditional creates are told more than once that they have won."""
        if (most := max(winners(self))) > 1:
            pytest.skip(f"{most} of {RACERS} plain clients that created one object at once were told that they won")

    def skip_unless_ours(self) -> None:
        if self.kind is None:
            pytest.skip("somebody else's server is not ours to kill")


@functools.cache
def winners(server: Server) -> list[int]:
    """How many plain clients have won each of some races to create an object."""
    clients = [server.client() for _ in range(RACERS)]
    start = threading.Barrier(RACERS)

    def create(client: Any, key: str) -> bool:
        start.wait(20)
        try:
            client.put_object(Bucket=server.bucket, Key=key, Body=b"mine", IfNoneMatch="*")
        except ClientError as err:
            if error_code(err) in LOST:
                return False
            raise
        return True

    with ThreadPoolExecutor(RACERS) as pool:
        return [sum(pool.map(create, clients, [f"races/{number}"] * RACERS)) for number in range(RACES)]


def error_code(err: ClientError) -> str:
    return str(err.response["Error"]["Code"])


def choose() -> tuple[Kind | None, str]:
    """The first server that can be had, and why others could not be."""
    named = os.environ.get(CHOSEN)
    if named and named not in KINDS:
        raise pytest.UsageError(f"{CHOSEN}={named!r}: there are {', '.join(KINDS)}")
    reasons: list[str] = []
    for kind in [KINDS[named]] if named else list(KINDS.values()):
        try:
            fetch(kind)
        except UnavailableError as err:
            reasons.append(str(err))
        else:
            return kind, "; ".join(reasons)
    return None, "; ".join(reasons)


def fetch_patiently(rounds: int) -> None:
    """Have a server on this machine before the tests begin; a mirror that does not answer is asked again."""
    if os.environ.get("DCPSVC_TEST_S3"):
        return
    for left in reversed(range(rounds)):
        kind, reason = choose()
        if kind or not left:
            break
        print(f"no S3 server yet: {reason}; trying again", flush=True)
        time.sleep(20)
    if kind:
        print(f"S3 server for the tests: {kind.name}" + (f" ({reason})" if reason else ""))
    else:
        print(f"there is no S3 server for the tests: {reason}")


def fetch(kind: Kind) -> None:
    """Have it on this machine; at once where it is already."""
    try:
        kind.run("fetch.sh", str(kind.home))
    except (subprocess.SubprocessError, OSError) as err:
        told = str(getattr(err, "stderr", None) or err).strip().splitlines()
        raise UnavailableError(f"{kind.name} cannot be fetched: {told[-1] if told else err}") from err


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


if __name__ == "__main__":
    fetch_patiently(rounds=4 if os.environ.get("CI") else 1)
