"""File systems behind fsspec: sftp, smb, hdfs and the like."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Any

from dcpsvc.storage.names import temp_name
from dcpsvc.storage.wire import BlobWire

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from dcpsvc.storage.cargo import Cargo, Carried


class FileWire(BlobWire):
    """A file system behind fsspec: directories are made, and files are written aside and moved to their name."""

    def put(self, path: str, data: bytes) -> None:
        """See :class:`Wire`."""
        with self._aside(path) as temp:
            self._fs.pipe_file(temp, data)

    def put_file(self, path: str, cargo: Cargo, nbytes: int) -> Carried:
        """See :class:`Wire`."""
        with self._aside(path) as temp:
            return super().put_file(temp, cargo, nbytes)

    def read(self, path: str, begin: int, end: int) -> bytes:
        """See :class:`Wire`."""
        with _directory_is_no_object():
            return super().read(path, begin, end)

    def delete(self, path: str) -> None:
        """See :class:`Wire`."""
        with _directory_is_no_object():
            super().delete(path)

    def listing(self, root: str, prefix: str) -> Iterator[tuple[str, int]]:
        """See :class:`Wire`; walked here, since fsspec's own walk takes every failure for an empty directory."""
        self._fs.invalidate_cache()
        yield from self._walk(f"{root}/{prefix}".rstrip("/"))

    def _walk(self, folder: str) -> Iterator[tuple[str, int]]:
        try:
            found: list[dict[str, Any]] = self._fs.ls(folder, detail=True)
        except FileNotFoundError:
            return
        for info in found:
            name = str(info["name"])
            if name.strip("/") == folder.strip("/"):
                # How fsspec lists a file.
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if info["type"] == "directory":
                yield from self._walk(name.rstrip("/"))
            elif info["type"] == "file":
                yield name, int(info["size"])

    @contextlib.contextmanager
    def _aside(self, path: str) -> Generator[str]:
        parent = path.rpartition("/")[0]
        temp = f"{parent}/{temp_name()}"
        self._fs.makedirs(parent, exist_ok=True)
        try:
            yield temp
            self._fs.mv(temp, path)
        except BaseException:  # an interrupt too leaves nothing
            # A temporary name that stays is never listed, and must not hide what went wrong before.
            with contextlib.suppress(Exception):
                self._fs.rm_file(temp)
            raise


@contextlib.contextmanager
def _directory_is_no_object() -> Generator[None]:
    try:
        yield
    except IsADirectoryError as err:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from err
