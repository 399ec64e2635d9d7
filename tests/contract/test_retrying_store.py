"""Retries: what is tried again, how often, for how long, and what ends it."""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING

import pytest
from store_contract import local_file

from dcpsvc.errors import StoreAccessError, StoreUnavailableError
from dcpsvc.storage.memory import MemoryStore
from dcpsvc.storage.retry import RetryingStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dcpsvc.storage.base import Entry


class Flaky(MemoryStore):
    """A store that fails ``times`` times before, or after, it does what it is asked."""

    def __init__(self, times: int, *, error: type = StoreUnavailableError, after: bool = False) -> None:
        super().__init__(uuid.uuid4().hex)
        self.times, self.error, self.after, self.calls = times, error, after, 0

    def _misbehave(self, *, after: bool) -> None:
        if after == self.after and self.calls <= self.times:
            raise self.error("test", "here", f"failure {self.calls}")

    def create(self, key: str, data: bytes) -> bool:
        self.calls += 1
        self._misbehave(after=False)
        created = super().create(key, data)
        self._misbehave(after=True)
        return created

    def put_file(self, key: str, path: Path, *, progress: Callable[[int], None] | None = None) -> None:
        self.calls += 1
        if progress:
            progress(4)
        self._misbehave(after=False)
        if progress:
            progress(6)
        super().put_file(key, path)

    def list(self, prefix: str) -> list[Entry]:
        self.calls += 1
        self._misbehave(after=False)
        return super().list(prefix)


class Time:
    """A clock that moves only when somebody waits."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def pause(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        self.now += seconds
        return False


def retrying(store: MemoryStore, time: Time, **options: float) -> RetryingStore:
    return RetryingStore(store, clock=lambda: time.now, pause=time.pause, **options)  # type: ignore[arg-type]


def test_what_passes_is_tried_again_until_it_works() -> None:
    flaky, time = Flaky(4), Time()
    assert retrying(flaky, time).list("") == []
    assert flaky.calls == 5
    assert len(time.pauses) == 4


def test_the_last_error_is_raised_when_the_tries_are_used_up() -> None:
    flaky, time = Flaky(99), Time()
    with pytest.raises(StoreUnavailableError, match="failure 3"):
        retrying(flaky, time, tries=3).list("")
    assert flaky.calls == 3
    assert len(time.pauses) == 2


def test_who_gives_up_says_how_often_and_how_long_it_was_tried() -> None:
    flaky, time = Flaky(99), Time()
    with pytest.raises(StoreUnavailableError, match=r"failure 3 \(tried 3 times in \d+\.\d s\)") as caught:
        retrying(flaky, time, tries=3).list("")
    assert f"in {time.now:.1f} s" in caught.value.reason
    assert isinstance(caught.value.__cause__, StoreUnavailableError)
    with pytest.raises(StoreUnavailableError) as again:
        RetryingStore(retrying(flaky, time, tries=3), clock=lambda: time.now, pause=time.pause, tries=2).list("")
    assert again.value.reason.count("tried") == 1


def test_what_does_not_pass_is_not_tried_again() -> None:
    flaky, time = Flaky(99, error=StoreAccessError), Time()
    with pytest.raises(StoreAccessError):
        retrying(flaky, time).list("")
    assert flaky.calls == 1
    assert time.pauses == []


def test_every_operation_gets_tries_of_its_own() -> None:
    flaky, time = Flaky(2), Time()
    store = retrying(flaky, time, tries=3)
    assert store.list("") == []
    flaky.times = flaky.calls + 2
    assert store.list("") == []


def test_no_try_begins_after_the_deadline() -> None:
    flaky, time = Flaky(10**6), Time()
    with pytest.raises(StoreUnavailableError):
        retrying(flaky, time, tries=10**6, deadline_s=60.0).list("")
    assert 40.0 < time.now <= 60.0


def test_pauses_grow_and_are_random_and_bounded() -> None:
    flaky, time = Flaky(200), Time()
    retrying(flaky, time, tries=1000, deadline_s=1e9, wait_max_s=3.0).list("")
    assert max(time.pauses) <= 3.0
    assert len(set(time.pauses)) > 100
    assert time.pauses[0] <= 0.5


def test_a_long_first_try_does_not_use_up_the_deadline(tmp_path: Path) -> None:
    time, flaky = Time(), Flaky(1)

    def slow(nbytes: int) -> None:
        time.now += 1000.0 * nbytes

    retrying(flaky, time).put_file("data/step/x", local_file(tmp_path, 10), progress=slow)
    assert flaky.calls == 2


def test_once_stopped_a_failure_is_final() -> None:
    flaky, stop, time = Flaky(99), threading.Event(), Time()
    stop.set()
    with pytest.raises(StoreUnavailableError, match="failure 1"):
        RetryingStore(flaky, stop=stop, pause=time.pause).list("")
    assert flaky.calls == 1
    assert time.pauses == []


def test_stopping_ends_a_pause_and_no_try_follows() -> None:
    flaky, stop = Flaky(99), threading.Event()

    def pause(_: float) -> bool:
        stop.set()
        return stop.wait(0)

    with pytest.raises(StoreUnavailableError, match="failure 1"):
        RetryingStore(flaky, stop=stop, pause=pause).list("")
    assert flaky.calls == 1


def test_a_real_pause_ends_at_once_when_stopped() -> None:
    flaky, stop = Flaky(99), threading.Event()
    failed = threading.Event()

    class Telling(Flaky):
        def list(self, prefix: str) -> list[Entry]:
            failed.set()
            return flaky.list(prefix)

    caught: list[BaseException] = []

    def work() -> None:
        try:
            RetryingStore(Telling(0), tries=10**6, deadline_s=1e6, wait_max_s=1e6, stop=stop).list("")
        except StoreUnavailableError as err:
            caught.append(err)

    thread = threading.Thread(target=work)
    thread.start()
    assert failed.wait(10)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert len(caught) == 1


def test_a_create_whose_answer_was_lost_is_still_ours() -> None:
    flaky, time = Flaky(1, after=True), Time()
    assert retrying(flaky, time).create("manifests/a", b"token 1") is True
    assert flaky.calls == 2
    assert MemoryStore(flaky.url.removeprefix("memory://")).get("manifests/a", max_nbytes=9) == b"token 1"


def test_a_create_that_loses_to_somebody_else_while_the_answer_was_lost_says_false() -> None:
    flaky, time = Flaky(1), Time()
    flaky.put("manifests/a", b"token 2")
    assert retrying(flaky, time).create("manifests/a", b"token 1") is False


def test_a_create_that_was_never_in_doubt_is_not_compared() -> None:
    flaky, time = Flaky(0), Time()
    flaky.put("manifests/a", b"same")
    assert retrying(flaky, time).create("manifests/a", b"same") is False


def test_progress_over_several_tries_adds_up_to_the_file(tmp_path: Path) -> None:
    flaky, time, heard = Flaky(2), Time(), list[int]()
    retrying(flaky, time).put_file("data/step/x", local_file(tmp_path, 10), progress=heard.append)
    assert heard == [4, 6]
