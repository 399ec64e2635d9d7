"""The contract on a real S3 server, and what only a real server shows."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from store_contract import MIB, RACERS, BrokenStoreContract, StoreContract, local_file, race

import dcpsvc
from dcpsvc.errors import StoreAccessError, StoreError, StoreNotFoundError
from dcpsvc.storage.objectstore import ObjectStore
from dcpsvc.storage.open import open_store
from dcpsvc.storage.retry import RetryingStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.storage.base import Store
    from tests.s3.servers import Server

    Reopen = Callable[[], Store]

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]
SOURCE = str(Path(dcpsvc.__file__).parents[1])


@pytest.fixture
def run_root(s3_server: Server) -> str:
    return f"s3://{s3_server.bucket}/{uuid.uuid4().hex}/run"


@pytest.fixture
def store(reopen: Reopen) -> Store:
    return reopen()


class TestS3Store(StoreContract, BrokenStoreContract):
    race_rounds = 25

    @pytest.fixture
    def reopen(self, s3_server: Server, run_root: str) -> Reopen:
        second = ObjectStore(run_root, s3_server.storage_options)
        stores = itertools.chain([ObjectStore(run_root, s3_server.storage_options)], itertools.repeat(second))
        return lambda: next(stores)

    def test_exactly_one_of_16_racing_creates_wins_and_its_bytes_are_there(self, s3_server, store, reopen):
        s3_server.skip_where_several_win()
        super().test_exactly_one_of_16_racing_creates_wins_and_its_bytes_are_there(store, reopen)

    @pytest.fixture
    def broken(self, s3_server: Server) -> Store:
        return ObjectStore("s3://there-is-no-such-bucket/run", s3_server.storage_options)


class TestS3StoreWithAWrongSecret(BrokenStoreContract):
    @pytest.fixture
    def broken(self, s3_server: Server, run_root: str) -> Store:
        return ObjectStore(run_root, {**s3_server.storage_options, "secret": "wrong-secret"})

    def test_it_is_called_an_access_error_and_shows_no_secret(self, broken: Store) -> None:
        with pytest.raises(StoreAccessError, match="secret key does not fit") as caught:
            broken.list("manifests/")
        assert "wrong-secret" not in str(caught.value)


def test_16_clients_racing_have_exactly_one_winner_every_time(s3_server: Server, run_root: str) -> None:
    s3_server.skip_where_several_win()
    rounds = int(os.environ.get("DCPSVC_TEST_RACE_ROUNDS", "25"))
    clients = [open_store(run_root, s3_server.storage_options) for _ in range(RACERS)]
    won = []
    for round_ in range(rounds):
        key = f"manifests/{round_}"
        won.append(race(lambda racer: clients[racer], key))
        assert clients[0].get(key, max_nbytes=100) == f"racer {won[-1][0]}".encode()
    assert [len(winners) for winners in won] == [1] * rounds


def test_a_file_of_several_parts_comes_back_and_its_progress_comes_in_parts(
    s3_server: Server, run_root: str, tmp_path: Path
) -> None:
    store, heard = open_store(run_root, s3_server.storage_options), list[int]()
    source = local_file(tmp_path, 80 * MIB + 1)
    store.put_file("data/step/x", source, progress=heard.append)
    assert sorted(heard) == [1, *[16 * MIB] * 5]
    assert store.read("data/step/x", 0, 80 * MIB + 1) == source.read_bytes()
    assert store.read("data/step/x", 32 * MIB - 1, 32 * MIB + 1) == source.read_bytes()[32 * MIB - 1 : 32 * MIB + 1]


HALF_WAY = """
import json, sys
from pathlib import Path
from dcpsvc.storage.open import open_store

def progress(nbytes):
    print("half way", flush=True)
    sys.stdin.read()

run_root, options, source = sys.argv[1:]
open_store(run_root, json.loads(options)).put_file("data/step/x", Path(source), progress=progress)
"""


def test_a_writer_killed_between_two_parts_leaves_no_visible_object(
    s3_server: Server, run_root: str, tmp_path: Path
) -> None:
    source = local_file(tmp_path, 80 * MIB)
    options = json.dumps(s3_server.storage_options)
    with subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, run_root, options, str(source)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCE},
    ) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "half way\n"
        writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    store = open_store(run_root, s3_server.storage_options)
    assert store.list("") == []
    with pytest.raises(StoreNotFoundError):
        store.size("data/step/x")
    store.put_file("data/step/x", source)
    assert store.list("data/") == [("data/step/x", 80 * MIB)]


def test_a_listing_of_more_than_one_page_is_whole(s3_server: Server, run_root: str) -> None:
    store, client = open_store(run_root, s3_server.storage_options), s3_server.client()
    prefix = run_root.removeprefix(f"s3://{s3_server.bucket}/")
    for number in range(1001):
        client.put_object(Bucket=s3_server.bucket, Key=f"{prefix}/data/{number:05d}", Body=b"x")
    assert [entry.key for entry in store.list("data/")] == [f"data/{number:05d}" for number in range(1001)]


def test_a_run_root_that_is_the_whole_bucket_works(s3_server: Server) -> None:
    store = open_store(f"s3://{s3_server.bucket}", s3_server.storage_options)
    store.put("whole-bucket/step/x", b"x")
    assert store.list("whole-bucket/") == [("whole-bucket/step/x", 1)]
    store.delete("whole-bucket/step/x")
    assert store.list("whole-bucket/") == []


def test_a_missing_bucket_is_named_as_such_and_not_created(s3_server: Server) -> None:
    store = ObjectStore("s3://there-is-no-such-bucket/run", s3_server.storage_options)
    for call in (
        lambda: store.list("manifests/"),
        lambda: store.put("manifests/a", b"x"),
        lambda: store.create("manifests/a", b"x"),
        lambda: store.size("manifests/a"),
    ):
        with pytest.raises(StoreError, match="no such bucket"):
            call()
    names = [bucket["Name"] for bucket in s3_server.client().list_buckets()["Buckets"]]
    assert "there-is-no-such-bucket" not in names


def test_a_server_killed_between_two_writes_loses_nothing_and_the_second_one_gets_through(
    s3_server: Server, run_root: str, tmp_path: Path
) -> None:
    s3_server.skip_unless_ours()

    def restart(_: float) -> bool:
        s3_server.start()
        return False

    store = RetryingStore(ObjectStore(run_root, s3_server.storage_options), pause=restart)
    source = local_file(tmp_path, 10 * MIB)
    store.put_file("data/step/x", source)
    assert store.create("manifests/a", b"first") is True
    s3_server.stop("KILL")
    assert store.create("manifests/b", b"second") is True
    assert store.read("data/step/x", 0, 10 * MIB) == source.read_bytes()
    assert store.list("manifests/") == [("manifests/a", 5), ("manifests/b", 6)]
