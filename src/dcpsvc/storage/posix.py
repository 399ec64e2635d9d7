"""A run root in a directory: a local disk, NFS, Lustre, GPFS."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dcpsvc import whereabouts
from dcpsvc.errors import StoreNotFoundError, StoreObjectError
from dcpsvc.storage import diskread, posixfile
from dcpsvc.storage.base import Entry
from dcpsvc.storage.names import check_key, check_prefix, is_temp
from dcpsvc.storage.oserror import from_os_error, local_file_error
from dcpsvc.storage.ranges import check_end, check_length, check_limit, check_range

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

T = TypeVar("T")

_TOP_LEVEL = 2
"""Components of a key directly below a top-level folder; such folders are never removed."""


class PosixStore:
    """Objects are files below ``root``; a missing root is made by the first write.

    A file is written aside, synced, and linked (:meth:`create`) or renamed (:meth:`put`) to its name, so readers see
    a whole object or none, and a crash of the machine loses nothing that was reported written. A killed writer
    leaves a ``.tmp-*`` file that no listing shows.
    """

    cached = True
    """What was read a moment ago is in this machine's memory, while there is room."""

    def __init__(self, root: Path) -> None:
        # A later chdir must not move the run root.
        self._root = Path(root).absolute()

    def __repr__(self) -> str:
        return f"PosixStore({str(self._root)!r})"

    @property
    def page_cache(self) -> str:
        """Whose memory that is; empty while the root is not there."""
        return whereabouts.page_cache(self._root)

    @property
    def url(self) -> str:
        """The directory, as an absolute path."""
        return str(self._root)

    @property
    def atomic_create(self) -> bool:
        """Always: ``link(2)`` refuses an existing name, on NFS too."""
        return True

    def create(self, key: str, data: bytes) -> bool:
        """See :meth:`Store.create <dcpsvc.storage.base.Store.create>`."""
        return self._place("create", key, lambda fd: posixfile.write_all(fd, data), posixfile.link)

    def create_fleeting(self, key: str, data: bytes) -> bool:
        """See :meth:`FleetingStore.create_fleeting <dcpsvc.storage.base.FleetingStore.create_fleeting>`."""
        fill = functools.partial(posixfile.write_all, data=data)
        return self._place("create", key, fill, posixfile.link, lasting=False)

    def put(self, key: str, data: bytes) -> None:
        """See :meth:`Store.put <dcpsvc.storage.base.Store.put>`."""
        self._place("put", key, lambda fd: posixfile.write_all(fd, data), posixfile.rename)

    def put_file(self, key: str, path: Path, *, progress: Callable[[int], None] | None = None) -> None:
        """See :meth:`Store.put_file <dcpsvc.storage.base.Store.put_file>`."""
        where = self._where(key)
        try:
            source = path.open("rb", buffering=0)
        except OSError as err:
            raise local_file_error(where, path, err) from err
        with source:

            def fill(fd: int) -> None:
                expected = os.fstat(source.fileno()).st_size
                check_length("put_file", where, posixfile.copy(source, fd, progress), expected)

            self._place("put_file", key, fill, posixfile.rename)

    def get(self, key: str, *, max_nbytes: int) -> bytes:
        """See :meth:`Store.get <dcpsvc.storage.base.Store.get>`."""
        with self._opened("get", key) as (fd, nbytes):
            check_limit(self._where(key), nbytes, max_nbytes)
            data = posixfile.read_range(fd, 0, nbytes)
        check_length("get", self._where(key), len(data), nbytes)
        return data

    def read(self, key: str, begin: int, end: int) -> bytes:
        """See :meth:`Store.read <dcpsvc.storage.base.Store.read>`."""
        check_range(self._where(key), begin, end)
        with self._opened("read", key) as (fd, nbytes):
            check_end(self._where(key), nbytes, end)
            data = posixfile.read_range(fd, begin, end)
        check_length("read", self._where(key), len(data), end - begin)
        return data

    def read_into(self, key: str, begin: int, views: Sequence[memoryview]) -> None:
        """See :meth:`ScatteringStore.read_into <dcpsvc.storage.base.ScatteringStore.read_into>`."""
        with self._opened("read", key) as (fd, nbytes):
            wanted = sum(map(len, views))
            check_end(self._where(key), nbytes, begin + wanted)
            found = posixfile.read_into(fd, begin, views)
        check_length("read", self._where(key), found, wanted)

    def stream(self, key: str, begin: int, end: int, look: Callable[[Iterator[memoryview]], T]) -> T:
        """See :class:`StreamingStore <dcpsvc.storage.base.StreamingStore>`."""
        with self._opened("read", key) as (fd, nbytes):
            check_end(self._where(key), nbytes, end)
            return look(self._whole(key, diskread.passing(fd, begin, end), end - begin))

    def stream_into(
        self,
        key: str,
        begin: int,
        views: Sequence[memoryview],
        look: Callable[[Iterator[memoryview]], T],
        *,
        once: bool = False,
    ) -> T:
        """See :class:`StreamingStore <dcpsvc.storage.base.StreamingStore>`; what is read once goes around the cache."""
        with self._opened("read", key) as (fd, nbytes):
            wanted = sum(map(len, views))
            check_end(self._where(key), nbytes, begin + wanted)
            return look(self._whole(key, diskread.filling(fd, begin, views, once=once), wanted))

    def _whole(self, key: str, found: Iterator[memoryview], nbytes: int) -> Iterator[memoryview]:
        """The same; refused where the file has become shorter meanwhile."""
        count = 0
        for view in found:
            count += len(view)
            yield view
        check_length("read", self._where(key), count, nbytes)

    def list(self, prefix: str) -> list[Entry]:
        """See :meth:`Store.list <dcpsvc.storage.base.Store.list>`."""
        parts = check_prefix("list", prefix)
        # The folder is found as the parent of any object in it, so one check serves keys and prefixes.
        folder = self._locate("list", prefix, (*parts, "any")).parent
        with self._translated("list", prefix):
            return sorted(_walk(folder, prefix))

    def is_file(self) -> bool:
        """See :class:`PlacedStore <dcpsvc.storage.placed.PlacedStore>`."""
        return self._root.is_file()

    def size(self, key: str) -> int:
        """See :meth:`Store.size <dcpsvc.storage.base.Store.size>`."""
        with self._opened("size", key) as (_, nbytes):
            return nbytes

    def written_s(self, key: str) -> float:
        """See :meth:`DatingStore.written_s <dcpsvc.storage.base.DatingStore.written_s>`."""
        target = self._locate("written", key, check_key("written", key))
        with self._translated("written", key):
            return target.lstat().st_mtime

    def delete(self, key: str) -> None:
        """See :meth:`Store.delete <dcpsvc.storage.base.Store.delete>`; an emptied ``data/<attempt>/`` goes with it."""
        parts = check_key("delete", key)
        target = self._locate("delete", key, parts)
        with self._translated("delete", key), contextlib.suppress(FileNotFoundError, IsADirectoryError):
            target.unlink(missing_ok=True)
            # Also where there was nothing: an earlier delete may have failed at exactly this point.
            posixfile.sync_directory(target.parent)
            if len(parts) > _TOP_LEVEL and posixfile.remove_if_empty(target.parent):
                posixfile.sync_directory(target.parent.parent)

    def delete_fleeting(self, key: str) -> None:
        """See :meth:`FleetingStore.delete_fleeting <dcpsvc.storage.base.FleetingStore.delete_fleeting>`."""
        target = self._locate("delete", key, check_key("delete", key))
        with self._translated("delete", key), contextlib.suppress(FileNotFoundError, IsADirectoryError):
            target.unlink()
            posixfile.remove_if_empty(target.parent)

    def remove_unfinished(self, before: str | float, *, dry_run: bool = False) -> int:
        """See :meth:`Store.remove_unfinished <dcpsvc.storage.base.Store.remove_unfinished>`: our temporary files."""
        found = 0
        with self._translated("remove_unfinished", ""):
            limit_s = self.written_s(before) if isinstance(before, str) else before
            for folder, _, names in os.walk(self._real_root()):
                for path in (Path(folder, name) for name in names if is_temp(name)):
                    with contextlib.suppress(FileNotFoundError):
                        if path.lstat().st_mtime < limit_s:
                            found += 1
                            if not dry_run:
                                _unlink_temp(path)
            if not dry_run:
                _remove_empty(self._real_root() / "data", limit_s)
        return found

    def _place(
        self,
        operation: str,
        key: str,
        fill: Callable[[int], None],
        publish: Callable[[Path, Path], bool],
        *,
        lasting: bool = True,
    ) -> bool:
        target = self._locate(operation, key, check_key(operation, key))
        with self._translated(operation, key):
            if not lasting:
                target.parent.mkdir(parents=True, exist_ok=True)  # else it is made to last
            fd, temp = posixfile.open_temp(target.parent)
            try:
                try:
                    fill(fd)
                    if lasting:
                        os.fsync(fd)
                finally:
                    os.close(fd)
                placed = publish(temp, target)
            finally:
                # A temporary name that stays is never listed, and must not hide what went wrong before.
                with contextlib.suppress(OSError):
                    temp.unlink(missing_ok=True)
            if lasting:
                posixfile.sync_upwards(target.parent, self._real_root())
            return placed

    @contextlib.contextmanager
    def _opened(self, operation: str, key: str) -> Generator[tuple[int, int]]:
        target = self._locate(operation, key, check_key(operation, key))
        with self._translated(operation, key):
            # O_NONBLOCK: a FIFO among the objects must not hang the reader.
            fd = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                if stat.S_ISDIR(status.st_mode):
                    raise StoreNotFoundError(operation, self._where(key), "there is no such object")
                if not stat.S_ISREG(status.st_mode):
                    raise StoreObjectError(operation, self._where(key), "it is not a regular file")
                yield fd, status.st_size
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _translated(self, operation: str, key: str) -> Generator[None]:
        try:
            yield
        except OSError as err:
            raise from_os_error(operation, self._where(key), err) from err

    def _real_root(self) -> Path:
        return Path(os.path.realpath(self._root))

    def _locate(self, operation: str, key: str, parts: tuple[str, ...]) -> Path:
        root = os.path.realpath(self._root)
        parent = os.path.realpath("/".join((root, *parts[:-1])))
        if parent != root and not parent.startswith(root.rstrip("/") + "/"):
            raise StoreObjectError(
                operation, self._where(key), f"a symbolic link leads out of the run root, to {parent}"
            )
        return Path(parent, parts[-1])

    def _where(self, key: str) -> str:
        return f"{self._root}/{key}"


def _remove_empty(data: Path, before_s: float) -> None:
    """Folders of attempts whose writer was killed before its first file, or after the last one was deleted."""
    with contextlib.suppress(FileNotFoundError), os.scandir(data) as found:
        for folder in found:
            with contextlib.suppress(FileNotFoundError):
                if folder.is_dir(follow_symlinks=False) and folder.stat(follow_symlinks=False).st_mtime < before_s:
                    posixfile.remove_if_empty(Path(folder.path))


def _unlink_temp(path: Path) -> None:
    path.unlink()
    if path.parent.parent.name == "data":
        posixfile.remove_if_empty(path.parent)


def _walk(folder: Path, prefix: str) -> Iterator[Entry]:
    try:
        found = os.scandir(folder)
    except FileNotFoundError:
        # Never written, or removed by a delete since its parent was read.
        return
    with found:
        for item in found:
            if is_temp(item.name):
                continue
            if item.is_dir(follow_symlinks=False):
                yield from _walk(folder / item.name, f"{prefix}{item.name}/")
            elif item.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    yield Entry(f"{prefix}{item.name}", item.stat(follow_symlinks=False).st_size)
