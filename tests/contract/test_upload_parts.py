"""A large file in parts: what the server proves is not read back, what fails leaves nothing, a busy one gets less."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from scripted_s3 import ScriptedS3, hangs_up, says
from store_contract import MIB, local_file

from dcpsvc.config import Limits
from dcpsvc.errors import CorruptShardError, StoreAccessError, StoreError, StoreUnavailableError
from dcpsvc.stages.upload import upload_shard
from dcpsvc.storage.cargo import Cargo, unchecked
from dcpsvc.storage.objectstore import ObjectStore
from dcpsvc.storage.open import open_store
from tests.unit.one_shard import KEY, make_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from scripted_s3 import Fault, Handler

    Make = Callable[..., ObjectStore]

PARTS = 4
SIZE = PARTS * 5 * MIB - 1
SHARD, RECORD = make_shard(SIZE)


def small(**limits: float) -> Limits:
    return Limits(**{"part_nbytes": 5 * MIB, "concurrency": 2, "patience_s": 5.0, **limits})


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedS3]:
    with ScriptedS3() as running:
        yield running


@pytest.fixture
def make(server: ScriptedS3) -> Make:
    server.reset()
    server.compares_md5 = True
    return lambda **limits: ObjectStore("s3://bucket/run", server.options(), limits=small(**limits))


def is_proven(store: ObjectStore, key: str, path: Path, check: Callable[[int, memoryview], None] = unchecked) -> bool:
    return store.carry(key, Cargo(path=path, check=check)).proven


def on_parts(server: ScriptedS3, fault: Fault, count: int) -> None:
    """Let the next ``count`` parts of a multipart upload meet a fault."""
    left = [None] * count

    def maybe(handler: Handler) -> None:
        if handler.command == "PUT" and "partNumber" in handler.path and left:
            left.pop()
            fault(handler)
        else:
            handler.truthful()

    server.faults.extend([maybe] * 100)


def test_a_server_that_compares_checksums_is_believed(server: ScriptedS3, make: Make, tmp_path: Path) -> None:
    source = local_file(tmp_path, SIZE)
    seen: list[tuple[int, int]] = []
    store = make()
    assert is_proven(store, "data/s/x", source, lambda begin, view: seen.append((begin, len(view)))) is True
    assert server.objects == {"run/data/s/x": source.read_bytes()}
    assert sorted(seen) == [(at, min(5 * MIB, SIZE - at)) for at in range(0, SIZE, 5 * MIB)]


def test_a_server_that_ignores_checksums_is_not(server: ScriptedS3, make: Make, tmp_path: Path) -> None:
    server.compares_md5 = False
    source = local_file(tmp_path, SIZE)
    assert is_proven(make(), "data/s/x", source) is False
    assert server.objects == {"run/data/s/x": source.read_bytes()}


@pytest.mark.parametrize("server_compares", [True, False])
def test_a_shard_is_read_back_only_from_a_server_that_proves_nothing(
    server: ScriptedS3, make: Make, tmp_path: Path, *, server_compares: bool
) -> None:
    server.compares_md5 = server_compares
    path = tmp_path / "shard"
    path.write_bytes(SHARD)
    upload_shard(make(), RECORD, path)
    assert server.objects == {f"run/{KEY}": SHARD}
    assert any(line.startswith("GET") for line in server.requests) is not server_compares


def test_what_the_server_was_asked_first_leaves_no_object(server: ScriptedS3, make: Make, tmp_path: Path) -> None:
    server.compares_md5 = False
    make().put_file("data/s/x", local_file(tmp_path, 10))
    assert list(server.objects) == ["run/data/s/x"]


@pytest.mark.parametrize("at", [100, 3 * MIB, SIZE - 5, len(SHARD) - 3])
def test_a_local_file_that_rotted_is_not_sent_to_the_end(
    server: ScriptedS3, make: Make, tmp_path: Path, at: int
) -> None:
    path = tmp_path / "shard"
    path.write_bytes(SHARD[:at] + bytes([SHARD[at] ^ 1]) + SHARD[at + 1 :])
    with pytest.raises(CorruptShardError, match=KEY):
        upload_shard(make(), RECORD, path)
    assert server.objects == {}
    assert server.uploads == {}


@pytest.mark.parametrize("fault", [says(503, "SlowDown"), says(500, "InternalError"), says(400, "BadDigest"), hangs_up])
def test_a_part_that_fails_in_passing_is_sent_again_and_the_others_are_not(
    server: ScriptedS3, make: Make, tmp_path: Path, fault: Fault
) -> None:
    source = local_file(tmp_path, SIZE)
    on_parts(server, fault, 2)
    assert is_proven(make(), "data/s/x", source) is True
    assert server.objects == {"run/data/s/x": source.read_bytes()}
    parts = [line for line in server.requests if "partNumber" in line]
    assert len(parts) <= PARTS + 2


def test_a_part_that_never_gets_through_ends_in_time_and_leaves_nothing(
    server: ScriptedS3, make: Make, tmp_path: Path
) -> None:
    on_parts(server, says(503, "SlowDown"), 99)
    with pytest.raises(StoreUnavailableError, match="slow down"):
        make(patience_s=0.2).put_file("data/s/x", local_file(tmp_path, SIZE))
    assert server.objects == {}
    assert server.uploads == {}


def test_a_part_that_is_refused_is_not_sent_again_and_leaves_nothing(
    server: ScriptedS3, make: Make, tmp_path: Path
) -> None:
    on_parts(server, says(403, "AccessDenied"), 99)
    with pytest.raises(StoreAccessError):
        make(concurrency=1).put_file("data/s/x", local_file(tmp_path, SIZE))
    assert len([line for line in server.requests if "partNumber" in line]) == 1
    assert server.uploads == {}


def test_a_busy_server_gets_fewer_parts_at_once(server: ScriptedS3, make: Make, tmp_path: Path) -> None:
    store = make(concurrency=4)
    store.put_file("data/s/x", local_file(tmp_path, 10))
    pace = store._wire._pace
    slowest = []

    def slow(handler: Handler) -> None:
        says(503, "SlowDown")(handler)
        slowest.append(pace.turns)

    on_parts(server, slow, 3)
    store.put_file("data/s/y", local_file(tmp_path, SIZE))
    assert pace.turns < 4
    assert len(server.objects["run/data/s/y"]) == SIZE


def test_no_more_parts_than_allowed_are_under_way(server: ScriptedS3, make: Make, tmp_path: Path) -> None:
    lock, under_way, most = threading.Lock(), 0, 0

    def counted(handler: Handler) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        answer = handler.answer

        def last(status: int, body: bytes = b"", length: int | None = None) -> None:
            nonlocal under_way
            with lock:  # behind the answer the client may be faster than we are
                under_way -= 1
            answer(status, body, length)

        handler.answer = last  # type: ignore[method-assign]
        handler.truthful()

    server.faults.extend([counted] * 100)
    make(concurrency=2).put_file("data/s/x", local_file(tmp_path, SIZE))
    assert most <= 2


def test_a_completion_whose_answer_was_lost_counts(server: ScriptedS3, make: Make, tmp_path: Path) -> None:
    source = local_file(tmp_path, SIZE)
    lost: list[str] = []

    def completes_and_dies(handler: Handler) -> None:
        if handler.command != "POST" or "uploadId" not in handler.path or lost:
            handler.truthful()
            return
        lost.append(handler.path)
        handler.answer = lambda *_: None  # type: ignore[method-assign]
        handler.truthful()
        handler.close_connection = True

    server.faults.extend([completes_and_dies] * 100)
    assert is_proven(make(), "data/s/x", source) is True
    assert server.objects == {"run/data/s/x": source.read_bytes()}
    assert len([line for line in server.requests if line.startswith("POST") and "uploadId" in line]) == 2


def test_an_object_that_is_not_what_was_sent_is_not_proven(server: ScriptedS3, make: Make, tmp_path: Path) -> None:
    def loses_a_part(handler: Handler) -> None:
        if handler.command == "POST" and "uploadId" in handler.path:
            next(iter(server.uploads.values())).popitem()
        handler.truthful()

    server.faults.extend([loses_a_part] * 100)
    with pytest.raises(StoreError, match="bytes went over"):
        make().put_file("data/s/x", local_file(tmp_path, SIZE))


def test_a_stop_ends_the_pauses_between_tries(server: ScriptedS3, make: Make, tmp_path: Path) -> None:
    stop = threading.Event()
    store = open_store("s3://bucket/run", server.options(), stop=stop, limits=small(patience_s=1e6))
    on_parts(server, lambda handler: (stop.set(), says(503, "SlowDown")(handler)), 99)
    with pytest.raises(StoreUnavailableError):
        store.put_file("data/s/x", local_file(tmp_path, SIZE))
    assert len([line for line in server.requests if "partNumber" in line]) <= 2


def test_encryption_asked_for_is_sent_with_the_object(server: ScriptedS3, make: Make, tmp_path: Path) -> None:
    extra = {"s3_additional_kwargs": {"ServerSideEncryption": "AES256"}}
    store = ObjectStore("s3://bucket/run", {**server.options(), **extra}, limits=small())
    asked: list[str | None] = []

    def listens(handler: Handler) -> None:
        if handler.command == "POST" and "uploads" in handler.path:
            asked.append(handler.headers.get("x-amz-server-side-encryption"))
        handler.truthful()

    server.faults.extend([listens] * 100)
    assert is_proven(store, "data/s/x", local_file(tmp_path, SIZE)) is True
    assert asked == ["AES256"]
