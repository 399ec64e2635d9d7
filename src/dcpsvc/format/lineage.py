"""Where a checkpoint comes from that no training step wrote: a sealed side file, never required to load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc.errors import FormatError
from dcpsvc.format import keys
from dcpsvc.format.manifest import FORMAT
from dcpsvc.format.parse import Fields
from dcpsvc.format.seal import check_seal, seal

if TYPE_CHECKING:
    from dcpsvc.format.keys import Attempt

MAX_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """How one checkpoint was made from another.

    Attributes:
        attempt: The new one.
        root: Where its source lies, for people.
        run_id: Identity of that run root.
        source: Which checkpoint of it.
        created: UTC time, ISO 8601.
        changes: What differs from the source, a line each; empty for a copy.
    """

    attempt: Attempt
    root: str
    run_id: str
    source: Attempt
    created: str
    changes: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = "; ".join(self.changes) or "a copy"
        return f"from step {self.source.step} (attempt {self.source.attempt}) of {self.root}: {what}"

    def dumps(self) -> bytes:
        """The file's content."""
        return seal(
            {
                "format": FORMAT,
                "attempt": self.attempt.manifest,
                "root": self.root,
                "run_id": self.run_id,
                "source": self.source.manifest,
                "created": self.created,
                "changes": list(self.changes),
            }
        )


def loads(path: str, data: bytes) -> Lineage:
    """Parse a lineage.

    Raises:
        FormatError: It is not one.
    """
    fields = Fields.parse(path, data, FormatError)
    if (version := fields.get("format", int)) != FORMAT:
        raise fields.fail(f"format version {version}, this package reads {FORMAT}")
    check_seal(fields)
    found = Lineage(
        attempt=_attempt(fields, "attempt"),
        root=fields.text("root", str.isprintable),
        run_id=fields.text("run_id", str.isprintable),
        source=_attempt(fields, "source"),
        created=fields.text("created", str.isprintable),
        changes=tuple(str(change) for change in fields.get("changes", list)),
    )
    if found.attempt.lineage != path:
        raise fields.fail(f"its content says {found.attempt}")
    return found


def _attempt(fields: Fields, name: str) -> Attempt:
    key = fields.get(name, str)
    attempt = keys.attempt_of(key)
    if attempt is None or attempt.manifest != key:
        raise fields.fail(f"field {name!r} names no manifest")
    return attempt
