"""Lines on their way to the run root, on this machine's disk, where they outlive the process."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from dcpsvc.format import keys

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SEGMENT_NBYTES = 4 << 20
"""A segment that has grown so large is brought to the run root, however few saves it tells of."""


@dataclass(slots=True)
class Segment:
    """Lines that go to the run root together.

    Attributes:
        key: Where.
        data: All lines so far.
    """

    key: str
    data: bytearray
    _path: Path | None = None
    _file: BinaryIO | None = None

    def add(self, line: bytes) -> None:
        """One more line, on the disk when this returns, as far as a killed process is concerned.

        Raises:
            OSError: It is in memory only.
        """
        self.data += line
        if self._file is not None:
            self._file.write(line)

    def delivered(self) -> None:
        """It is at the run root: nobody needs it here."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self.let_go()

    def let_go(self) -> None:
        """What is on the disk may be taken along by the next start."""
        if self._file is not None:
            self._file.close()
            self._file = None


def begin(folder: Path | None, key: str) -> Segment:
    """A segment without lines, in memory alone without a folder.

    Raises:
        OSError: Nothing can be written there.
    """
    if folder is None:
        return Segment(key, bytearray())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / key.removeprefix(keys.EVENTS)
    file = path.open("ab", buffering=0)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process dies: then the file is whose takes it
    return Segment(key, bytearray(), path, file)


def orphans(folder: Path) -> Iterator[Segment]:
    """What dead processes left: each is this process's from now on, until it is delivered or let go."""
    for path in sorted(folder.glob("*.rank-*.jsonl")):
        try:
            file = path.open("r+b", buffering=0)
        except OSError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = os.fstat(file.fileno()).st_nlink == 0  # another took it meanwhile
        except OSError:  # somebody lives
            gone = True
        if gone:
            file.close()
            continue
        yield Segment(keys.EVENTS + path.name, bytearray(file.readall() or b""), path, file)
