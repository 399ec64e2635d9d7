"""The folder of PEFT in a checkpoint, as the manifest names it: what it was made of, and every file of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcpsvc.format import keys

if TYPE_CHECKING:
    from dcpsvc.format.parse import Fields

MAX_NBYTES = 1 << 40
_MAX_COMPONENT = 4096
_DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """One file of the folder.

    Attributes:
        path: Run-relative key.
        nbytes: Its size.
        digest: XXH3-128 of all its bytes.
    """

    path: str
    nbytes: int
    digest: str

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return {"path": self.path, "nbytes": self.nbytes, "digest": self.digest}

    @classmethod
    def from_fields(cls, fields: Fields) -> AdapterFile:
        """Validate one entry: a name of ours and a size that makes sense."""
        return cls(
            path=fields.text("path", keys.is_adapter_file),
            nbytes=fields.count("nbytes", MAX_NBYTES),
            digest=fields.text("digest", _DIGEST.fullmatch),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFolder:
    """All of it.

    Attributes:
        component: The module it was made of: its name in the state, or a dotted beginning below it.
        files: In the order of their names; never empty.
    """

    component: str
    files: tuple[AdapterFile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return {"component": self.component, "files": [file.to_json() for file in self.files]}

    @classmethod
    def from_fields(cls, fields: Fields) -> AdapterFolder:
        """Validate it."""
        component = fields.text("component", lambda name: 0 < len(name) <= _MAX_COMPONENT)
        folder = cls(component=component, files=tuple(map(AdapterFile.from_fields, fields.children("files"))))
        paths = [file.path for file in folder.files]
        if not paths or paths != sorted(set(paths)):
            raise fields.fail("the files of the adapter folder are none, or not in the order of their names")
        return folder
