"""A real server behind a network that spoils requests: what passes is tried again, and nothing false is believed."""

from __future__ import annotations

import contextlib
import datetime as dt
import random
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import TYPE_CHECKING

import pytest
from store_contract import MIB, local_file

from dcpsvc.config import Limits
from dcpsvc.errors import CorruptShardError, StoreAccessError, StoreError, StoreUnavailableError
from dcpsvc.stages.upload import upload_shard
from dcpsvc.storage.memory import MemoryStore
from dcpsvc.storage.objectstore import ObjectStore
from dcpsvc.storage.open import open_store
from dcpsvc.storage.shards import VerifiedShard
from tests.s3 import spoiling as faults
from tests.unit.one_shard import KEY, make_shard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dcpsvc.storage.base import Store
    from tests.s3.servers import Server
    from tests.s3.spoiling import Fault, Proxy

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

PART = 5 * MIB
CONTENT, RECORD = make_shard(4 * PART - 1000)
PARTS = "^PUT .*partNumber"
READS = "^GET .*rank-"


@pytest.fixture
def store(run_root: str, options: dict[str, object]) -> Store:
    """What a job has, with small parts."""
    return open_store(run_root, options, limits=Limits(part_nbytes=PART, concurrency=4, patience_s=30.0))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize(
    "fault",
    [
        faults.says(503, "SlowDown"),
        faults.says(500, "InternalError"),
        faults.resets_in_the_request,
        faults.resets_in_the_answer,
        faults.loses_the_answer,
        faults.stalls,
        faults.corrupts_the_request,
    ],
    ids=["503", "500", "reset up", "reset down", "lost answer", "stall", "corrupted"],
)
@pytest.mark.parametrize("where", [PARTS, "^POST .*uploadId", "^POST .*uploads"], ids=["part", "complete", "begin"])
def test_an_upload_gets_through_whole_and_leaves_nothing_else(
    store: Store,
    between: Proxy,
    shard: Path,
    truth: Callable[[], tuple[dict[str, bytes], int]],
    *,
    where: str,
    fault: Fault,
) -> None:
    between.spoil(where, fault, 3 if where == PARTS else 1)
    upload_shard(store, RECORD, shard)
    assert between.left == 0
    objects, unfinished = truth()
    assert objects == {KEY: CONTENT}
    # An upload whose id never reached us cannot be ended by us: a later clean-up finds it.
    assert unfinished == (
        where == "^POST .*uploads" and fault in {faults.loses_the_answer, faults.resets_in_the_answer}
    )
    assert not [line for line in between.seen if line.startswith("GET")], "what the server proved was read back"


@pytest.mark.parametrize(
    "fault",
    [
        faults.says(503, "SlowDown"),
        faults.says(500, "InternalError"),
        faults.resets_in_the_answer,
        faults.loses_the_answer,
        faults.stalls,
        faults.ends_early,
    ],
    ids=["503", "500", "reset", "lost answer", "stall", "ends early"],
)
def test_a_read_gets_through_whole(store: Store, between: Proxy, shard: Path, fault: Fault) -> None:
    upload_shard(store, RECORD, shard)
    between.spoil(READS, fault, 2)
    VerifiedShard([store], RECORD).verify()
    assert between.left == 0


def test_bytes_that_change_on_their_way_down_are_refused_or_read_elsewhere(
    store: Store, between: Proxy, shard: Path
) -> None:
    upload_shard(store, RECORD, shard)
    elsewhere = MemoryStore(f"elsewhere-{uuid.uuid4().hex}")
    elsewhere.put(KEY, CONTENT)
    both = VerifiedShard([store, elsewhere], RECORD)
    assert both.read(0, 10) == CONTENT[:10]
    between.spoil(READS, faults.corrupts_the_answer, 2)
    assert both.read(0, PART) == CONTENT[:PART]
    with pytest.raises(CorruptShardError, match=KEY):
        VerifiedShard([store], RECORD).verify()


@pytest.mark.parametrize("fault", [faults.loses_the_answer, faults.resets_in_the_answer], ids=["lost", "reset"])
def test_a_commit_whose_answer_was_lost_is_ours(
    store: Store, between: Proxy, truth: Callable[[], tuple[dict[str, bytes], int]], fault: Fault
) -> None:
    between.spoil("^PUT .*manifests/a", fault, 2)
    assert store.create("manifests/a", b"token 1") is True
    assert store.create("manifests/a", b"token 2") is False
    assert truth() == ({"manifests/a": b"token 1"}, 0)


def test_a_burst_of_slow_down_slows_the_rank_and_every_file_arrives(
    run_root: str, options: dict[str, object], between: Proxy, tmp_path: Path,
    truth: Callable[[], tuple[dict[str, bytes], int]],
) -> None:  # fmt: skip
    store = ObjectStore(run_root, options, limits=Limits(part_nbytes=PART, concurrency=8, patience_s=60.0))
    files = {f"data/s/rank-{n}": local_file(tmp_path, 2 * PART + n, f"{n}") for n in range(4)}
    store.put_file("first", local_file(tmp_path, 10, "first"))
    between.spoil(PARTS, faults.says(503, "SlowDown"), 20)
    turns: list[int] = []

    def put(key: str) -> None:
        store.put_file(key, files[key], progress=lambda _: turns.append(store._wire._pace.turns))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, files))
    assert between.left == 0
    assert min(turns) <= 2
    objects, unfinished = truth()
    assert unfinished == 0
    assert {key: path.read_bytes() for key, path in files.items()} == {k: v for k, v in objects.items() if k in files}


@pytest.mark.parametrize("code", ["ExpiredToken", "RequestTimeTooSkewed", "AccessDenied"])
def test_credentials_that_end_during_an_upload_end_it_at_once_with_a_sentence_and_without_debris(
    store: Store, between: Proxy, shard: Path, truth: Callable[[], tuple[dict[str, bytes], int]], code: str
) -> None:
    between.spoil(PARTS, faults.says(403, code), 50)
    with pytest.raises(StoreAccessError, match=r"session token has expired|clock|access denied"):
        upload_shard(store, RECORD, shard)
    assert truth() == ({}, 0)


def test_a_clock_that_is_two_hours_off_is_an_access_error(
    run_root: str, options: dict[str, object], shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_hours_ago(*, remove_tzinfo: bool = True) -> dt.datetime:
        now = dt.datetime.now(dt.UTC) - dt.timedelta(hours=2)
        return now.replace(tzinfo=None) if remove_tzinfo else now

    for name in ("botocore.auth", "botocore.crt.auth"):
        with contextlib.suppress(ImportError):  # its own signing, if awscrt is installed
            monkeypatch.setattr(import_module(name), "get_current_datetime", two_hours_ago)
    store = ObjectStore(run_root, options)
    for call in (lambda: store.put_file("data/x", shard), lambda: store.list("manifests/")):
        with pytest.raises(StoreAccessError, match=r"clock|denied"):
            call()


def test_a_server_that_never_lets_a_part_through_ends_the_upload_in_time_and_without_debris(
    run_root: str, options: dict[str, object], between: Proxy, shard: Path,
    truth: Callable[[], tuple[dict[str, bytes], int]],
) -> None:  # fmt: skip
    between.spoil(PARTS, faults.says(503, "SlowDown"), 1000)
    store = ObjectStore(run_root, options, limits=Limits(part_nbytes=PART, patience_s=1.0))
    with pytest.raises(StoreUnavailableError, match="slow down"):
        upload_shard(store, RECORD, shard)
    assert truth() == ({}, 0)


def test_what_a_killed_writer_left_is_found_and_ended_and_nothing_newer_or_elsewhere(
    s3_server: Server, run_root: str, store: Store
) -> None:
    client, prefix = s3_server.client(), run_root.removeprefix(f"s3://{s3_server.bucket}/")

    def begin(key: str) -> None:
        client.create_multipart_upload(Bucket=s3_server.bucket, Key=key)

    def left() -> list[str]:
        found = client.list_multipart_uploads(Bucket=s3_server.bucket, Prefix=prefix).get("Uploads", [])
        return sorted(upload["Key"].removeprefix(prefix) for upload in found)

    begin(f"{prefix}/data/old")
    begin(f"{prefix}-other/data/old")
    threading.Event().wait(1.1)  # the server's clock counts in seconds
    store.put("probes/now", b"x")
    begin(f"{prefix}/data/new")
    store.remove_unfinished("probes/now")
    assert left() == ["-other/data/old", "/data/new"]
    threading.Event().wait(1.1)
    store.put("probes/now", b"x")
    store.remove_unfinished("probes/now")
    assert left() == ["-other/data/old"]


def test_a_server_killed_under_load_and_started_again_gets_every_file_and_keeps_every_acknowledged_one(
    s3_server: Server, run_root: str, tmp_path: Path
) -> None:
    s3_server.skip_unless_ours()
    store = open_store(run_root, s3_server.storage_options, limits=Limits(part_nbytes=PART, patience_s=60.0))
    files = {f"data/s/rank-{n:05d}": local_file(tmp_path, 3 * PART + n, f"{n}") for n in range(6)}
    half_way, acknowledged, lock = threading.Event(), list[str](), threading.Lock()

    def put(key: str) -> None:
        store.put_file(key, files[key], progress=lambda _: half_way.set())
        with lock:
            acknowledged.append(key)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(put, key) for key in files]
        assert half_way.wait(60)
        s3_server.stop("KILL")
        with lock:
            before = list(acknowledged)
        s3_server.start()
        for key in before:
            assert store.read(key, 0, files[key].stat().st_size) == files[key].read_bytes()
        for one in running:
            one.result(200)
    for key, path in files.items():
        assert store.read(key, 0, path.stat().st_size) == path.read_bytes()


@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_of_passing_faults_ends_in_a_proven_shard_or_an_error_and_never_in_a_wrong_one(
    store: Store, between: Proxy, shard: Path, truth: Callable[[], tuple[dict[str, bytes], int]], seed: int
) -> None:
    dice = random.Random(seed)
    kinds = [
        faults.says(503, "SlowDown"), faults.says(500, "InternalError"), faults.resets_in_the_request,
        faults.loses_the_answer, faults.corrupts_the_request,
    ]  # fmt: skip
    for _ in range(12):
        between.spoil(dice.choice([PARTS, "uploadId", "^PUT", "^HEAD"]), dice.choice(kinds))
    try:
        upload_shard(store, RECORD, shard)
    except StoreError:
        return
    objects, _ = truth()
    assert objects[KEY] == CONTENT
