"""L6: a file that is written with a deadline is closed by whoever is left behind in it, never under it.

And what is carried from one place to another is what was written, however often the way breaks off.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dcpsvc import deadline
from dcpsvc.deadline import SystemClock
from dcpsvc.errors import CorruptShardError, StoreError, StoreUnavailableError
from dcpsvc.format.adapter import AdapterFile
from dcpsvc.format.digest import digest
from dcpsvc.storage import wholefile
from dcpsvc.storage.bounded import BoundedDisk, NewFiles
from dcpsvc.storage.posix import PosixStore
from dcpsvc.storage.retry import RetryingStore
from dcpsvc.storage.wholefile import Writer

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = "data/step-000000000001.a/adapter/adapter_model.safetensors"
BOUND_S = 30.0


def open_files(path: Path) -> list[str]:
    """Numbers under which this process has it open."""
    there = []
    for number in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the listing is gone
            if number.readlink() == path:
                there.append(number.name)
    return there


def test_what_is_written_is_hashed_and_closed(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    writer = Writer(path, KEY)
    writer.write(b"one")
    writer.write(b"two")
    file = writer.finish()
    assert (path.read_bytes(), file.nbytes, file.digest) == (b"onetwo", 6, digest(b"onetwo"))
    assert open_files(path) == []


def test_a_write_that_hangs_keeps_its_file_open_until_it_ends_and_then_closes_it(tmp_path: Path) -> None:
    """A pipe takes some bytes, and then none until somebody reads."""
    path, ended = tmp_path / "pipe", threading.Event()
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = Writer(path, KEY)

    def write() -> None:
        try:
            writer.write(bytes(1 << 20))
        finally:
            ended.set()

    with pytest.raises(TimeoutError):
        deadline.call(write, 0.2, "a write")
    deadline.call(writer.close, BOUND_S, "close")
    assert len(open_files(path)) == 2  # the reader's, and the one that is written to
    os.set_blocking(reader, True)
    while os.read(reader, 1 << 16):  # to the end: nobody writes any more
        pass
    assert ended.wait(BOUND_S)
    assert open_files(path) == [str(reader)]
    os.close(reader)


def test_nothing_is_written_to_a_file_that_was_closed_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    writer = Writer(path, KEY)
    writer.close()
    with pytest.raises(StoreError, match="closed already"):
        writer.write(b"late")
    assert not path.exists()


# --- a disk that may hang -----------------------------------------------------------------------------


class Still(SystemClock):
    """Stands still until it is told how much time has passed."""

    seconds = 0.0

    def now(self) -> float:
        return self.seconds


def test_what_a_disk_is_asked_for_has_one_deadline_for_all_of_it(tmp_path: Path) -> None:
    clock = Still()
    disk = BoundedDisk(clock, "a test")
    for _ in range(2):
        disk.begin(BOUND_S)
        assert disk.within(lambda: "done") == "done"
        clock.seconds += BOUND_S
        with pytest.raises(TimeoutError, match="this node's disk took longer than 30 s over a test"):
            disk.within(lambda: pytest.fail("there is no time left"))


def test_what_the_disk_says_itself_comes_out_as_it_is() -> None:
    disk = BoundedDisk(SystemClock(), "a test")
    disk.begin(BOUND_S)
    with pytest.raises(FileNotFoundError):
        disk.within(Path("/nowhere").stat)


def test_new_files_are_told_in_the_order_of_their_names_and_closed(tmp_path: Path) -> None:
    disk = BoundedDisk(SystemClock(), "a test")
    disk.begin(BOUND_S)
    files = NewFiles(tmp_path, disk)
    files.write("b/two", [b"t", b"wo"])
    files.write("a/one", [b""])
    files.write("a/one.more", [b"1"])
    told = [(file.path, file.nbytes) for file in files.finish()]
    assert told == [("a/one", 0), ("a/one.more", 1), ("b/two", 3)]
    assert [(tmp_path / key).stat().st_size for key, _ in told] == [0, 1, 3]
    files.close()
    with pytest.raises(StoreError, match="closed already"):
        files.finish()


def test_files_that_nobody_wants_are_closed_though_one_of_them_hangs(tmp_path: Path) -> None:
    disk = BoundedDisk(SystemClock(), "a test")
    disk.begin(BOUND_S)
    files = NewFiles(tmp_path, disk)
    files.write("whole", [b"1"])
    os.mkfifo(tmp_path / "pipe")
    disk.begin(0.2)
    with pytest.raises(TimeoutError, match=r"took longer than 0\.2 s"):
        files.write("pipe", [b"nobody reads"])
    disk.begin(BOUND_S)
    files.close()
    assert open_files(tmp_path / "whole") == []
    os.close(os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK))  # whoever hangs there goes on


# --- carried ----------------------------------------------------------------------------------------

DATA = b"one and two"
FILE = AdapterFile(path=KEY, nbytes=len(DATA), digest=digest(DATA))


class Turning(PosixStore):
    """Keeps other bytes than it was given."""

    def put_file(self, key: str, path: Path, *, progress: Any = None) -> None:
        self.put(key, path.read_bytes()[::-1])


class Breaking(PosixStore):
    """Breaks off in the middle of what it gives first."""

    whole = False

    def stream(self, key: str, begin: int, end: int, look: Any) -> Any:
        def given() -> Iterator[memoryview]:
            data = self.read(key, begin, end)
            yield memoryview(data[:3])
            if not self.whole:
                self.whole = True
                raise StoreUnavailableError("read", key, "broken off")
            yield memoryview(data[3:])

        return look(given())


def test_a_store_that_does_not_give_back_what_it_was_given_is_found_out_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with pytest.raises(CorruptShardError, match="do not match the manifest"):
        wholefile.put(Turning(tmp_path / "root"), FILE, path)


def test_a_copy_that_breaks_off_is_begun_anew_and_holds_each_byte_once(tmp_path: Path) -> None:
    store = Breaking(tmp_path / "root")
    store.put(KEY, DATA)
    wholefile.bring(RetryingStore(store, pause=lambda _: False), FILE, tmp_path / "here" / "file")
    assert store.whole
    assert (tmp_path / "here" / "file").read_bytes() == DATA
