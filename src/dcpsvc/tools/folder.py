"""The directory an export goes into: empty, or one that the same export began and did not finish."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import ExportError
from dcpsvc.format.parse import dump

if TYPE_CHECKING:
    from collections.abc import Iterable

_NOTE = ".dcpsvc-export.json"
_PARTIAL = ".partial"


class Folder:
    """Files that appear under their names when they are whole.

    Args:
        path: The directory; made if it is not there.
        about: What is exported, and how: an export that was cut short is carried on only by its like.

    Raises:
        ExportError: The directory holds something else.
    """

    def __init__(self, path: str | os.PathLike[str], about: dict[str, Any]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ExportError(str(self.path), "it is no directory; name one that is empty or not there")
        self.path.mkdir(parents=True, exist_ok=True)
        note = self.path / _NOTE
        if any(self.path.iterdir()) and not (note.is_file() and _read(note) == json.loads(dump(about))):
            raise ExportError(str(self.path), "the directory is not empty; name an empty one, nothing is overwritten")
        note.write_bytes(dump(about))

    def has(self, name: str) -> bool:
        """Whether a file is whole already."""
        return (self.path / name).is_file()

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """A file, durable when this returns; not there before."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + _PARTIAL)
        with partial.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)

    def finish(self) -> None:
        """All is there: the note goes."""
        (self.path / _NOTE).unlink()
        for directory in (self.path, *(child for child in self.path.iterdir() if child.is_dir())):
            descriptor = os.open(directory, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _read(note: Path) -> Any:
    try:
        return json.loads(note.read_bytes())
    except ValueError:
        return None
