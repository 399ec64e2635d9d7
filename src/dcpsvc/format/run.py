"""run.json: the identity of a run root, written once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dcpsvc.errors import FormatError, UnsupportedFormatError
from dcpsvc.format.manifest import FORMAT
from dcpsvc.format.parse import Fields, dump

MAX_NBYTES = 1 << 16

_RUN_ID = re.compile(r"[0-9a-z][0-9a-z-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        run_id: Names the run on every local tier.
        created: UTC time, ISO 8601.
    """

    run_id: str
    created: str

    def dumps(self) -> bytes:
        """The file's content."""
        return dump({"format": FORMAT, "run_id": self.run_id, "created": self.created})


def loads(root: str, data: bytes) -> Run:
    """Parse run.json.

    Raises:
        UnsupportedFormatError: Another version of the format.
        FormatError: Something else stands there.
    """
    fields = Fields.parse(f"{root}/run.json", data, FormatError)
    if (version := fields.get("format", int)) != FORMAT:
        raise UnsupportedFormatError(root, f"written in format version {version}; this package reads version {FORMAT}")
    return Run(run_id=fields.text("run_id", _RUN_ID.fullmatch), created=fields.get("created", str))
