"""The contract of a Store as tests. One class a store inherits; every assertion is what a stranger would see.

A test class gives two fixtures: ``reopen`` makes a fresh store on the same place, and ``store`` is the one at work.
"""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from dcpsvc.errors import CorruptShardError, StoreError, StoreNotFoundError
from dcpsvc.storage.base import ProvingStore, read_into, written_s
from dcpsvc.storage.cargo import Cargo

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dcpsvc.storage.base import Store

    Reopen = Callable[[], Store]

RACERS = 16
MIB = 2**20
ESCAPES = [
    "",
    "/etc/passwd",
    "../outside",
    "data/../../outside",
    "data/./x",
    "data//x",
    "data/",
    "data\\x",
    "data/\0",
    "data/.tmp-x",
    ".tmp-1/x",
    "data/\ud800",
    "x" * 2000,
]


def race(store_of: Callable[[int], Store], key: str) -> list[int]:
    """The racers whom ``create`` told that they won."""
    start = threading.Barrier(RACERS)

    def run(racer: int) -> bool:
        store = store_of(racer)
        start.wait()
        return store.create(key, f"racer {racer}".encode())

    with ThreadPoolExecutor(RACERS) as pool:
        return [racer for racer, won in enumerate(pool.map(run, range(RACERS))) if won]


def local_file(folder: Path, nbytes: int, name: str = "source") -> Path:
    path = folder / name
    path.write_bytes(random.Random(nbytes).randbytes(nbytes))
    return path


class StoreContract:
    """What every store promises."""

    race_rounds = 5
    big_nbytes = 20 * MIB

    def test_a_created_object_is_there_for_everybody(self, store: Store, reopen: Reopen) -> None:
        assert store.create("manifests/a.json", b"hello") is True
        assert reopen().get("manifests/a.json", max_nbytes=100) == b"hello"

    def test_a_second_create_says_false_and_the_first_bytes_stay(self, store: Store, reopen: Reopen) -> None:
        assert store.create("manifests/a.json", b"first") is True
        assert reopen().create("manifests/a.json", b"second") is False
        assert store.create("manifests/a.json", b"fifth") is False
        assert reopen().get("manifests/a.json", max_nbytes=100) == b"first"

    def test_exactly_one_of_16_racing_creates_wins_and_its_bytes_are_there(self, store: Store, reopen: Reopen) -> None:
        for round_ in range(self.race_rounds):
            key = f"manifests/race-{round_}.json"
            winners = race(lambda _: store, key)
            if store.atomic_create:
                assert len(winners) == 1
            assert len(winners) >= 1
            assert reopen().get(key, max_nbytes=100) in [f"racer {winner}".encode() for winner in winners]

    def test_a_small_object_comes_back_as_it_was_put(self, store: Store, reopen: Reopen) -> None:
        store.put("run.json", b"\0\xff\r\n")
        store.put("layouts/empty.json", b"")
        assert reopen().get("run.json", max_nbytes=4) == b"\0\xff\r\n"
        assert reopen().get("layouts/empty.json", max_nbytes=0) == b""

    def test_a_put_that_is_sent_again_changes_nothing(self, store: Store, reopen: Reopen) -> None:
        store.put("run.json", b"same")
        store.put("run.json", b"same")
        assert [tuple(entry) for entry in reopen().list("")] == [("run.json", 4)]
        assert reopen().get("run.json", max_nbytes=4) == b"same"

    def test_a_20_mib_file_comes_back_and_its_progress_adds_up(
        self, store: Store, reopen: Reopen, tmp_path: Path
    ) -> None:
        source, heard = local_file(tmp_path, self.big_nbytes), []
        store.put_file("data/step/rank-00000.safetensors", source, progress=heard.append)
        assert sum(heard) == self.big_nbytes
        assert all(nbytes > 0 for nbytes in heard)
        assert reopen().size("data/step/rank-00000.safetensors") == self.big_nbytes
        back = reopen().read("data/step/rank-00000.safetensors", 0, self.big_nbytes)
        assert back == source.read_bytes()

    def test_an_empty_file_becomes_an_empty_object(self, store: Store, reopen: Reopen, tmp_path: Path) -> None:
        store.put_file("data/step/rank-00000.safetensors", local_file(tmp_path, 0))
        assert reopen().size("data/step/rank-00000.safetensors") == 0

    def test_a_missing_local_file_is_an_error_about_that_file_and_leaves_nothing(
        self, store: Store, reopen: Reopen, tmp_path: Path
    ) -> None:
        with pytest.raises(StoreError, match="local file") as caught:
            store.put_file("data/step/x", tmp_path / "nowhere")
        assert not isinstance(caught.value, StoreNotFoundError)
        assert reopen().list("") == []

    @pytest.mark.parametrize(("begin", "end"), [(0, 10), (0, 1), (3, 7), (9, 10), (0, 0), (10, 10)])
    def test_a_range_is_read_exactly(self, store: Store, begin: int, end: int) -> None:
        store.put("data/step/x", b"0123456789")
        assert store.read("data/step/x", begin, end) == b"0123456789"[begin:end]

    @pytest.mark.parametrize(("begin", "end"), [(0, 11), (9, 12), (10, 11), (11, 11), (20, 30), (5, 4), (-3, 4)])
    def test_a_range_that_is_not_in_the_object_is_refused(self, store: Store, begin: int, end: int) -> None:
        store.put("data/step/x", b"0123456789")
        with pytest.raises(StoreError) as caught:
            store.read("data/step/x", begin, end)
        assert not isinstance(caught.value, StoreNotFoundError)
        assert not caught.value.transient

    def test_a_range_is_read_into_several_pieces_of_memory_and_nothing_beside_them(
        self, store: Store, tmp_path: Path
    ) -> None:
        source = local_file(tmp_path, 3 * MIB + 7)
        store.put_file("data/step/x", source)
        memory = bytearray(b"." * (2 * MIB + 30))
        view = memoryview(memory)
        read_into(store, "data/step/x", 5, [view[10:11], view[20:20], view[20 : 20 + 2 * MIB]])
        expected = source.read_bytes()[5 : 6 + 2 * MIB]
        assert memory == b"." * 10 + expected[:1] + b"." * 9 + expected[1:] + b"." * 10

    @pytest.mark.parametrize("begin", [1, 10, 20])
    def test_memory_that_the_object_cannot_fill_is_refused(self, store: Store, begin: int) -> None:
        store.put("data/step/x", b"0123456789")
        with pytest.raises(StoreError) as caught:
            read_into(store, "data/step/x", begin, [memoryview(bytearray(4)), memoryview(bytearray(6))])
        assert not isinstance(caught.value, StoreNotFoundError)
        assert not caught.value.transient
        with pytest.raises(StoreNotFoundError):
            read_into(store, "data/step/y", begin, [memoryview(bytearray(4))])

    def test_a_file_is_checked_on_its_way_and_what_fails_the_check_leaves_no_object(
        self, store: Store, reopen: Reopen, tmp_path: Path
    ) -> None:
        source, seen = local_file(tmp_path, self.big_nbytes), dict[int, bytes]()
        if not isinstance(store, ProvingStore):
            return

        def see(begin: int, view: memoryview) -> None:
            seen[begin] = bytes(view)

        if store.carry("data/step/x", Cargo(path=source, check=see)).proven:
            assert b"".join(seen[begin] for begin in sorted(seen)) == source.read_bytes()
            assert all(begin % MIB == 0 for begin in seen)

            def fail(begin: int, _: memoryview) -> None:
                if begin:
                    raise CorruptShardError("data/step/y", "rotted")

            with pytest.raises(CorruptShardError):
                store.carry("data/step/y", Cargo(path=source, check=fail))
        assert reopen().list("") == [("data/step/x", self.big_nbytes)]

    def test_an_object_that_is_not_there_is_not_found(self, store: Store) -> None:
        store.put("data/step/x", b"x")
        for key in ("data/step/y", "nowhere/at/all", "data/step", "data"):
            with pytest.raises(StoreNotFoundError):
                store.size(key)
            with pytest.raises(StoreNotFoundError):
                store.get(key, max_nbytes=10)
            with pytest.raises(StoreNotFoundError):
                store.read(key, 0, 1)

    def test_a_listing_is_sorted_and_shows_that_prefix_only(self, store: Store, reopen: Reopen) -> None:
        for key in ("data/s1/b", "data/s1/a", "data/s1.x/a", "data/s10/a", "run.json", "manifests/m", "data2/z"):
            store.put(key, key.encode())
        assert [entry.key for entry in reopen().list("data/s1/")] == ["data/s1/a", "data/s1/b"]
        assert [entry.key for entry in reopen().list("data/")] == [
            "data/s1.x/a",
            "data/s1/a",
            "data/s1/b",
            "data/s10/a",
        ]
        assert [entry.key for entry in reopen().list("manifests/")] == ["manifests/m"]
        assert len(reopen().list("")) == 7
        assert all(entry.nbytes == len(entry.key) for entry in reopen().list(""))

    def test_a_prefix_nobody_has_written_is_an_empty_list(self, store: Store) -> None:
        assert store.list("manifests/") == []
        assert store.list("") == []
        store.put("data/step/x", b"x")
        assert store.list("manifests/") == []
        assert store.list("data/other/") == []

    def test_a_listing_shows_at_once_what_others_wrote_and_deleted(self, store: Store, reopen: Reopen) -> None:
        other = reopen()
        assert store.list("manifests/") == []
        other.put("manifests/a", b"a")
        assert [entry.key for entry in store.list("manifests/")] == ["manifests/a"]
        other.put("manifests/b", b"bb")
        other.delete("manifests/a")
        assert [tuple(entry) for entry in store.list("manifests/")] == [("manifests/b", 2)]
        with pytest.raises(StoreNotFoundError):
            store.size("manifests/a")

    def test_a_prefix_that_is_no_folder_is_refused(self, store: Store) -> None:
        for prefix in ("manifests", "/", "../", "a//", "manifests/step-"):
            with pytest.raises(StoreError):
                store.list(prefix)

    def test_deleting_removes_one_object_and_deleting_again_is_no_error(self, store: Store, reopen: Reopen) -> None:
        store.put("data/step/x", b"x")
        store.put("data/step/y", b"y")
        store.delete("data/step/x")
        store.delete("data/step/x")
        store.delete("data/never/was")
        assert [entry.key for entry in reopen().list("")] == ["data/step/y"]
        store.delete("data/step/y")
        assert reopen().list("") == []
        store.put("data/step/x", b"again")
        assert reopen().get("data/step/x", max_nbytes=5) == b"again"

    def test_deleting_a_folders_name_deletes_nothing(self, store: Store, reopen: Reopen) -> None:
        store.put("data/step/x", b"x")
        store.delete("data/step")
        assert [entry.key for entry in reopen().list("")] == ["data/step/x"]

    def test_an_object_larger_than_its_reader_allows_is_refused(self, store: Store) -> None:
        store.put("manifests/a", b"12345")
        assert store.get("manifests/a", max_nbytes=5) == b"12345"
        with pytest.raises(StoreError, match="5 bytes"):
            store.get("manifests/a", max_nbytes=4)

    @pytest.mark.parametrize("key", ESCAPES)
    def test_a_key_that_is_no_plain_relative_path_is_refused(
        self, store: Store, reopen: Reopen, tmp_path: Path, key: str
    ) -> None:
        source = local_file(tmp_path, 10)
        for call in (
            lambda: store.create(key, b"x"),
            lambda: store.put(key, b"x"),
            lambda: store.put_file(key, source),
            lambda: store.get(key, max_nbytes=9),
            lambda: store.read(key, 0, 1),
            lambda: store.size(key),
            lambda: store.delete(key),
        ):
            with pytest.raises(StoreError) as caught:
                call()
            assert not isinstance(caught.value, StoreNotFoundError)
        assert reopen().list("") == []

    def test_many_threads_write_and_read_at_once(self, store: Store, reopen: Reopen, tmp_path: Path) -> None:
        def work(rank: int) -> bytes:
            key = f"data/step/rank-{rank:05d}"
            store.put_file(key, local_file(tmp_path, 1000 + rank, f"source-{rank}"))
            store.create(f"manifests/{rank}.json", b"m" * rank)
            return store.read(key, rank, 1000 + rank)

        with ThreadPoolExecutor(RACERS) as pool:
            read = list(pool.map(work, range(2 * RACERS)))
        for rank, data in enumerate(read):
            assert data == random.Random(1000 + rank).randbytes(1000 + rank)[rank:]
        assert [entry.nbytes for entry in reopen().list("data/step/")] == [1000 + rank for rank in range(2 * RACERS)]
        assert len(reopen().list("manifests/")) == 2 * RACERS

    def test_a_progress_callback_that_fails_leaves_no_object(
        self, store: Store, reopen: Reopen, tmp_path: Path
    ) -> None:
        def fail(_: int) -> None:
            raise StoreError("test", "here", "the caller gave up")

        source = local_file(tmp_path, self.big_nbytes)
        with pytest.raises(StoreError, match="gave up"):
            store.put_file("data/step/x", source, progress=fail)
        assert [entry for entry in reopen().list("") if entry.nbytes != self.big_nbytes] == []

    def test_the_url_says_where_it_is(self, store: Store) -> None:
        assert store.url
        assert store.url.split("://")[-1] in repr(store)

    def test_who_can_tell_when_an_object_was_written_tells_it_and_what_is_not_there_is_not_found(
        self, store: Store
    ) -> None:
        store.put("manifests/a", b"x")
        if (date := written_s(store, "manifests/a")) is not None:
            assert abs(date - time.time()) < 3600
            with pytest.raises(StoreNotFoundError):
                written_s(store, "manifests/b")


class BrokenStoreContract:
    """What a store says whose place cannot be used; ``broken`` is such a store."""

    def test_a_listing_that_fails_raises_and_is_never_an_empty_list(self, broken: Store) -> None:
        for prefix in ("manifests/", ""):
            with pytest.raises(StoreError) as caught:
                broken.list(prefix)
            assert not isinstance(caught.value, StoreNotFoundError)

    def test_every_write_fails_with_a_sentence(self, broken: Store, tmp_path: Path) -> None:
        source = local_file(tmp_path, 10)
        for call in (
            lambda: broken.create("manifests/a", b"x"),
            lambda: broken.put("manifests/a", b"x"),
            lambda: broken.put_file("manifests/a", source),
        ):
            with pytest.raises(StoreError) as caught:
                call()
            assert not isinstance(caught.value, StoreNotFoundError)
            assert " " in caught.value.reason

    def test_every_read_fails_and_does_not_say_that_there_is_no_object(self, broken: Store) -> None:
        for call in (
            lambda: broken.size("manifests/a"),
            lambda: broken.get("manifests/a", max_nbytes=1),
            lambda: broken.read("manifests/a", 0, 1),
        ):
            with pytest.raises(StoreError) as caught:
                call()
            assert not isinstance(caught.value, StoreNotFoundError)
