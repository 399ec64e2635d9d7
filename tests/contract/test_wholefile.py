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
from dcpsvc.errors import CorruptShardError, StoreError, StoreUnavailableError
from dcpsvc.format.adapter import AdapterFile
from dcpsvc.format.digest import digest
from dcpsvc.storage import wholefile
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
