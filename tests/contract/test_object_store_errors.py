"""What an S3 store says when the server, the credentials or the network misbehave."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from scripted_s3 import SECRET, ScriptedS3, hangs_up, says, says_nothing, stops_half_way, stores_and_hangs_up
from store_contract import BrokenStoreContract, StoreContract

from dcpsvc import identity
from dcpsvc.config import Limits
from dcpsvc.errors import (
    ConfigError,
    NoBucketError,
    RootError,
    StoreAccessError,
    StoreError,
    StoreFullError,
    StoreNotFoundError,
    StoreThrottledError,
    StoreUnavailableError,
)
from dcpsvc.format.run import Run
from dcpsvc.storage.base import read_into
from dcpsvc.storage.objectstore import ObjectStore
from dcpsvc.storage.open import open_store
from dcpsvc.storage.paging import pages
from dcpsvc.storage.remoteerror import from_remote_error
from dcpsvc.storage.retry import RetryingStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scripted_s3 import Fault

    from dcpsvc.storage.base import Store

BODY = b"token of attempt 1"


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedS3]:
    with ScriptedS3() as server:
        yield server


@pytest.fixture(scope="module")
def clients(running: ScriptedS3) -> list[ObjectStore]:
    """Made once: every new one loads botocore's model of S3, a fifth of a second."""
    return [ObjectStore("s3://bucket/run", running.options()) for _ in range(2)]


@pytest.fixture
def server(running: ScriptedS3) -> ScriptedS3:
    running.reset()
    return running


@pytest.fixture
def store(server: ScriptedS3, clients: list[ObjectStore]) -> ObjectStore:
    del server
    return clients[0]


class TestObjectStoreOnAScriptedServer(StoreContract):
    """The script is honest first, so that what it says when misbehaving means something."""

    @pytest.fixture
    def reopen(self, server: ScriptedS3, clients: list[ObjectStore]) -> Callable[[], Store]:
        del server
        return lambda: clients[1]


class TestObjectStoreWithoutAServer(BrokenStoreContract):
    @pytest.fixture
    def broken(self, server: ScriptedS3) -> Store:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        return ObjectStore("s3://bucket/run", {**server.options(), "endpoint_url": f"http://127.0.0.1:{port}"})


ANSWERS = [
    (says(503, "SlowDown"), StoreThrottledError),
    (says(503, "ServiceUnavailable"), StoreUnavailableError),
    (says(500, "InternalError"), StoreUnavailableError),
    (says(429, "TooManyRequests"), StoreThrottledError),
    (says(400, "RequestTimeout"), StoreUnavailableError),
    (says(409, "ConditionalRequestConflict"), StoreUnavailableError),
    (hangs_up, StoreUnavailableError),
    (says(403, "AccessDenied"), StoreAccessError),
    (says(403, "InvalidAccessKeyId"), StoreAccessError),
    (says(403, "SignatureDoesNotMatch"), StoreAccessError),
    (says(400, "ExpiredToken"), StoreAccessError),
    (says(403, "RequestTimeTooSkewed"), StoreAccessError),
    (says(403, "QuotaExceeded"), StoreFullError),
    (says(507, "InsufficientStorage"), StoreFullError),
    (says(404, "NoSuchBucket"), NoBucketError),
    (says(400, "SomethingNew"), StoreError),
    (says(501, "NotImplemented"), StoreError),
]


@pytest.mark.parametrize("operation", ["create", "put", "list", "read", "delete"])
@pytest.mark.parametrize(("fault", "kind"), ANSWERS)
def test_each_answer_has_its_type_and_shows_no_secret(
    server: ScriptedS3, store: ObjectStore, operation: str, fault: Fault, kind: type[StoreError]
) -> None:
    server.objects["run/manifests/a"] = BODY
    # Twice: aiohttp sends a request again by itself, once, when a connection breaks.
    server.faults.extend([fault, fault])
    calls = {
        "create": lambda: store.create("manifests/b", BODY),
        "put": lambda: store.put("manifests/b", BODY),
        "list": lambda: store.list("manifests/"),
        "read": lambda: store.read("manifests/a", 0, 3),
        "delete": lambda: store.delete("manifests/a"),
    }
    with pytest.raises(StoreError) as caught:
        calls[operation]()
    assert type(caught.value) is kind
    assert SECRET not in str(caught.value)
    assert "s3://bucket/run" in caught.value.where
    assert len(server.requests) == (2 if fault is hangs_up else 1)


def test_a_silent_server_is_given_up_on(server: ScriptedS3) -> None:
    server.faults.append(says_nothing)
    with pytest.raises(StoreUnavailableError):
        ObjectStore("s3://bucket/run", server.options(read_timeout=0.1)).list("manifests/")


def test_an_answer_that_stops_half_way_is_worth_another_try(server: ScriptedS3, store: ObjectStore) -> None:
    server.objects["run/data/x"] = b"0123456789"
    server.faults.append(stops_half_way)
    with pytest.raises(StoreUnavailableError):
        store.read("data/x", 0, 10)
    server.faults.append(stops_half_way)
    assert RetryingStore(store, pause=lambda _: False).read("data/x", 0, 10) == b"0123456789"


def test_a_create_that_was_stored_but_not_acknowledged_is_ours(server: ScriptedS3, store: ObjectStore) -> None:
    server.faults.extend([stores_and_hangs_up, hangs_up])
    assert RetryingStore(store, pause=lambda _: False).create("manifests/a", BODY) is True
    assert server.objects == {"run/manifests/a": BODY}


def test_the_client_library_resending_a_create_does_not_lose_it(server: ScriptedS3, store: ObjectStore) -> None:
    server.faults.append(stores_and_hangs_up)
    assert store.create("manifests/a", BODY) is True
    assert [line.partition("?")[0] for line in server.requests[:2]] == ["PUT /bucket/run/manifests/a"] * 2


def test_somebody_elses_object_of_the_same_size_is_not_ours(server: ScriptedS3, store: ObjectStore) -> None:
    server.objects["run/manifests/a"] = BODY[::-1]
    assert store.create("manifests/a", BODY) is False
    assert server.objects == {"run/manifests/a": BODY[::-1]}


def test_an_unanswered_conflict_is_not_called_a_conflict(server: ScriptedS3, store: ObjectStore) -> None:
    server.objects["run/manifests/a"] = BODY
    server.faults.extend([None, says(503, "SlowDown")])
    with pytest.raises(StoreUnavailableError):
        store.create("manifests/a", BODY)


def test_a_listing_is_one_request_for_that_prefix(server: ScriptedS3, store: ObjectStore) -> None:
    server.objects["run/data/step/x"] = server.objects["run/manifests/a"] = b"x"
    assert store.list("manifests/") == [("manifests/a", 1)]
    assert store.list("tombstones/") == []
    assert len(server.requests) == 2
    assert "prefix=run%2Fmanifests%2F" in server.requests[0]


def test_a_listing_of_several_pages_is_whole_and_one_whose_later_page_fails_is_an_error(
    server: ScriptedS3, store: ObjectStore
) -> None:
    server.objects.update({f"run/manifests/{number:03d}": b"x" for number in range(25)})
    server.names_a_page = 10
    names = [f"manifests/{number:03d}" for number in range(25)]
    assert [entry.key for entry in store.list("manifests/")] == names
    assert len(server.requests) == 3
    found = pages(store, "manifests/")
    assert [entry.key for entry in next(found)] == names[:10]
    assert len(server.requests) == 4
    server.faults.extend([says(503, "SlowDown")])
    with pytest.raises(StoreThrottledError):
        next(found)
    server.faults.extend([None, says(503, "SlowDown")])
    with pytest.raises(StoreThrottledError):
        store.list("manifests/")


def test_a_page_that_failed_is_tried_again_by_itself(server: ScriptedS3, store: ObjectStore) -> None:
    server.objects.update({f"run/manifests/{number:03d}": b"x" for number in range(25)})
    server.names_a_page = 10
    server.faults.extend([None, says(503, "SlowDown")])
    patient = RetryingStore(store, pause=lambda _: False)
    assert [len(page) for page in pages(patient, "manifests/")] == [10, 10, 5]
    assert len(server.requests) == 4


def test_a_read_is_tried_again_for_as_long_as_the_limits_say_and_says_so(server: ScriptedS3) -> None:
    server.objects["run/data/step/x"] = BODY
    server.faults.extend([says(500, "InternalError")] * 1000)
    patient = open_store("s3://bucket/run", server.options(), limits=Limits(patience_s=0.5))
    with pytest.raises(StoreUnavailableError, match=r"\(tried \d+ times in 0\.\d s\)"):
        read_into(patient, "data/step/x", 0, [memoryview(bytearray(len(BODY)))])


def test_a_root_that_is_an_object_is_a_file_and_one_where_nobody_may_look_or_a_bucket_is_none(
    server: ScriptedS3, store: ObjectStore
) -> None:
    assert not store.is_file()
    server.objects["run"] = BODY
    assert store.is_file()
    server.faults.extend([says(403, "AccessDenied")])
    assert not store.is_file()
    server.requests.clear()
    assert not ObjectStore("s3://bucket", server.options()).is_file()
    assert server.requests == []


def test_an_existing_run_is_found_by_one_request_and_only_where_there_is_none_somebody_looks_for_a_file(
    server: ScriptedS3, store: ObjectStore
) -> None:
    server.objects["run/run.json"] = Run(run_id="f0043bb33a0c", created="now").dumps()
    server.objects["run"] = BODY
    assert identity.find(store) is not None
    assert len(server.requests) == 1
    del server.objects["run/run.json"]
    with pytest.raises(RootError, match="a file, not a folder"):
        identity.find(store)
    del server.objects["run"]
    assert identity.find(store) is None


def test_a_consoles_empty_folder_is_no_object(server: ScriptedS3, store: ObjectStore) -> None:
    server.objects.update({"run/": b"", "run/manifests/": b"", "run/manifests/a": b"x"})
    assert store.list("") == [("manifests/a", 1)]
    assert store.list("manifests/") == [("manifests/a", 1)]


def test_a_bucket_is_never_created(server: ScriptedS3, store: ObjectStore) -> None:
    store.put("data/step/x", b"x")
    assert [line.partition("?")[0] for line in server.requests] == ["PUT /bucket/run/data/step/x"]


def test_a_large_create_is_refused_before_it_is_sent(server: ScriptedS3, store: ObjectStore) -> None:
    with pytest.raises(StoreError, match="larger than"):
        store.create("manifests/a", bytes(33 * 2**20))
    assert server.requests == []


def test_missing_credentials_are_an_access_error(server: ScriptedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    options = {name: value for name, value in server.options().items() if name not in {"key", "secret"}}
    with pytest.raises(StoreAccessError, match="no credentials found"):
        ObjectStore("s3://bucket/run", options).list("manifests/")


def test_an_unknown_error_shows_its_text_without_the_secrets() -> None:
    error = from_remote_error("put", "sftp://host/run", RuntimeError("login with hunter2 failed"), ["hunter2"])
    assert str(error) == "put sftp://host/run: RuntimeError: login with *** failed"


def test_an_error_of_ours_passes_as_it_is() -> None:
    ours = ConfigError("mine")
    assert from_remote_error("put", "s3://bucket", ours) is ours
    assert not isinstance(ours, StoreNotFoundError)
