"""A shard's file is the bytes it was given, whatever the file system thinks of O_DIRECT, and never half of them."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpsvc import linux
from dcpsvc.storage.diskfile import DiskFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KIB, MIB = 2**10, 2**20
PAGE = 4096
BORDERS = [
    *(0, 1, 511, 512, PAGE - 1, PAGE, PAGE + 1, MIB - 1, MIB, MIB + 1, MIB + PAGE),
    *(16 * MIB - 1, 16 * MIB, 16 * MIB + 1),
]


def aligned(nbytes: int) -> memoryview:
    """Page-aligned memory with something in it."""
    memory = mmap.mmap(-1, max(nbytes, 1))
    memory.write((os.urandom(997) * (nbytes // 997 + 1))[:nbytes])
    return memoryview(memory)[:nbytes]


def write(kind: type[DiskFile], path: Path, *parts: memoryview | bytes, lasting: bool = False) -> DiskFile:
    with kind(path, sum(map(len, parts))) as file:
        for part in parts:
            file.write(memoryview(part), lasting=lasting)
        file.sync()
        file.keep()
    return file


# --- file systems -----------------------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system; skips where that is not permitted."""
    mounted: list[Path] = []

    def make(kind: str, options: str = "rw", source: Path | str = "none") -> Path:
        target = tmp_path / f"mounted-{len(mounted)}"
        target.mkdir()
        done = command("mount", "-t", kind, "-o", options, source, target)
        if done.returncode:
            pytest.skip(f"mounting a {kind} is not permitted here: {done.stderr.strip()}")
        mounted.append(target)
        return target

    yield make
    for target in mounted:
        assert command("umount", "-l", target).returncode == 0  # a descriptor left open must not keep it


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which(str(words[0]))
    if program is None:
        pytest.skip(f"there is no {words[0]} here")
    return subprocess.run([program, *map(str, words[1:])], capture_output=True, text=True, check=False)


@pytest.fixture(params=["here", "tmpfs", "ramfs", "overlay"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, mount: Callable[..., Path]) -> Path:
    """A directory on a file system of each kind: ramfs refuses O_DIRECT at open, having made the file."""
    if request.param == "here":
        return tmp_path
    if request.param != "overlay":
        return mount(request.param)
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    return mount("overlay", f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work")


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("nbytes", [*BORDERS, 32 * MIB + PAGE, 130 * MIB + 1])
def test_a_file_is_what_was_written_on_every_file_system(folder: Path, nbytes: int, lasting: bool) -> None:  # noqa: FBT001
    body, table = aligned(nbytes), os.urandom(16 * (nbytes // MIB + 1))
    write(DiskFile, folder / "file", body, table, lasting=lasting)
    assert (folder / "file").read_bytes() == bytes(body) + table


def test_a_file_system_that_refuses_direct_writing_is_written_through_the_page_cache(
    mount: Callable[..., Path],
) -> None:
    body = aligned(3 * MIB)
    with DiskFile(mount("ramfs") / "file", len(body)) as file:
        assert not file.direct
        file.write(body)


def test_where_the_disk_allows_it_whole_pages_are_written_directly(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("not on this file system")
    with DiskFile(tmp_path / "file", 2 * MIB + 5) as file:
        file.write(aligned(2 * MIB))
        assert file.direct
        file.write(aligned(5))
        assert not file.direct


# --- what goes wrong on the way ---------------------------------------------------------------------


class RefusingToWrite(DiskFile):
    """Takes O_DIRECT when it is opened and not when it is written, from some call on."""

    takes = 0

    def _write_some(self, data: memoryview, at: int) -> int:
        if self.direct and self.takes == 0:
            raise OSError(errno.EINVAL, "simulated: not aligned as this disk wants it")
        self.takes -= 1
        return super()._write_some(data[: 64 * KIB], at)


class RefusingLater(RefusingToWrite):
    takes = 3


@pytest.mark.parametrize("kind", [RefusingToWrite, RefusingLater])
@pytest.mark.parametrize("nbytes", [PAGE, MIB, MIB + 1])
def test_a_file_system_that_refuses_at_a_write_gets_the_rest_through_the_page_cache(
    tmp_path: Path, kind: type[DiskFile], nbytes: int
) -> None:
    parts = aligned(nbytes), aligned(nbytes), b"table"
    file = write(kind, tmp_path / "file", *parts)
    assert (tmp_path / "file").read_bytes() == b"".join(map(bytes, parts))
    assert not file.direct


def test_memory_that_does_not_begin_on_a_page_is_written_all_the_same(tmp_path: Path) -> None:
    body = aligned(MIB + 1)[1:]
    write(DiskFile, tmp_path / "file", body)
    assert (tmp_path / "file").read_bytes() == bytes(body)


class Sluggish(DiskFile):
    """Takes a little at a time, and never as much as it is given."""

    def _write_some(self, data: memoryview, at: int) -> int:
        return super()._write_some(data[: max(1, len(data) // 3 // PAGE * PAGE)], at)


@given(
    st.lists(st.integers(0, 5 * PAGE), max_size=6), st.sampled_from([DiskFile, Sluggish, RefusingLater]), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_parts_of_any_size_come_out_end_to_end(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    kind: type[DiskFile],
    lasting: bool,  # noqa: FBT001
) -> None:
    path = tmp_path_factory.getbasetemp() / "file"
    parts = [aligned(size) for size in sizes]
    write(kind, path, *parts, lasting=lasting)
    content = path.read_bytes()
    path.unlink()
    assert content == b"".join(parts)


class Broken(DiskFile):
    """The second write fails."""

    error, calls = errno.EIO, 0

    def _write_some(self, data: memoryview, at: int) -> int:
        self.calls += 1
        if self.calls == 2:
            raise OSError(self.error, "simulated")
        return super()._write_some(data, at)


class Full(Broken):
    error = errno.ENOSPC

    def _reserve(self, nbytes: int) -> int:
        return 0  # a file system that does not say in advance


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("kind", [Broken, Full])
def test_an_error_on_the_way_leaves_nothing_and_comes_out_as_it_is(
    tmp_path: Path,
    kind: type[Broken],
    lasting: bool,  # noqa: FBT001
) -> None:
    with pytest.raises(OSError, match="simulated") as caught:
        write(kind, tmp_path / "file", aligned(MIB), aligned(MIB), lasting=lasting)
    assert caught.value.errno == kind.error
    assert list(tmp_path.iterdir()) == []


class Held(DiskFile):
    """The first write fails while the second is under way, and that one takes its time."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.begun, self.failed = threading.Event(), threading.Event()
        self.wrote_into = ""
        super().__init__(path, nbytes)

    def _write_some(self, data: memoryview, at: int) -> int:
        if at == 0:
            assert self.begun.wait(10)
            self.failed.set()
            raise OSError(errno.EIO, "simulated")
        self.begun.set()
        assert self.failed.wait(10)
        threading.Event().wait(0.2)  # for whoever would close it meanwhile
        self.wrote_into = str((Path("/proc/self/fd") / str(self._descriptor)).readlink())
        return super()._write_some(data, at)


def test_a_call_under_way_ends_before_the_descriptor_is_given_back(tmp_path: Path) -> None:
    with Held(tmp_path / "file", 64 * MIB) as file:
        file.write(aligned(64 * MIB), lasting=True)
        with pytest.raises(OSError, match="simulated"):
            file.sync()
    assert file.wrote_into == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_says_so_before_the_first_byte_and_nothing_is_left(mount: Callable[..., Path]) -> None:
    small = mount("tmpfs", f"size={MIB}")
    with pytest.raises(OSError, match="No space left") as caught:
        DiskFile(small / "file", 2 * MIB)
    assert caught.value.errno == errno.ENOSPC
    assert list(small.iterdir()) == []
    write(DiskFile, small / "file", aligned(MIB))


def test_a_file_that_is_too_large_takes_nothing_of_the_room_that_others_have(
    tmp_path: Path, mount: Callable[..., Path]
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"")
    os.truncate(disk, 64 * MIB)
    command("mkfs.ext4", "-q", disk)  # unlike tmpfs it takes what there is before it says that it is not enough
    folder = mount("ext4", "loop", disk)
    descriptor = os.open(folder / "file", os.O_CREAT | os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left"):
            linux.fallocate(descriptor, 128 * MIB)
        assert os.fstat(descriptor).st_blocks == 0
    finally:
        os.close(descriptor)


def test_a_file_that_nobody_keeps_is_gone(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), DiskFile(tmp_path / "file", MIB) as file:
        file.write(aligned(MIB))
        file.sync()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_another_file_of_that_name_is_neither_written_over_nor_removed(folder: Path) -> None:
    (folder / "file").write_bytes(b"somebody's")
    with pytest.raises(FileExistsError):
        DiskFile(folder / "file", 5)
    assert (folder / "file").read_bytes() == b"somebody's"


def test_no_descriptor_stays_open(folder: Path) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208 - names only
    write(DiskFile, folder / "one", aligned(MIB))
    with pytest.raises(OSError, match="simulated"):
        write(Broken, folder / "two", aligned(MIB), aligned(MIB))
    with pytest.raises(FileExistsError):
        DiskFile(folder / "one", 5)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
