"""What is written beside a checkpoint after its commit: small sealed documents that no load needs.

Each is created once under a name of its own; none is ever changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import FormatError
from dcpsvc.format import keys, numbers
from dcpsvc.format.manifest import FORMAT
from dcpsvc.format.parse import Fields
from dcpsvc.format.seal import check_seal, seal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcpsvc.format.keys import Attempt

MAX_NBYTES = 1 << 20
MAX_TEXT = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Metrics of a checkpoint that came after its commit.

    Attributes:
        attempt: Whose.
        recorded: UTC time, ISO 8601.
        metrics: Each replaces what the manifest, or an earlier record, says of the same name.
    """

    attempt: Attempt
    recorded: str
    metrics: Mapping[str, float]

    def dumps(self) -> bytes:
        """The file's content."""
        return seal(_about(self.attempt) | {"recorded": self.recorded, "metrics": numbers.dump(self.metrics)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Somebody wants a checkpoint to stay.

    Attributes:
        attempt: Which.
        created: UTC time, ISO 8601.
        by: Host and process.
        note: Why, for people.
    """

    attempt: Attempt
    created: str
    by: str
    note: str

    def dumps(self) -> bytes:
        """The file's content."""
        return seal(_about(self.attempt) | {"created": self.created, "by": self.by, "note": self.note})


def load_record(path: str, data: bytes) -> Record:
    """Parse a record of metrics.

    Raises:
        FormatError: It is not one, or it is another attempt's.
    """
    fields, attempt = _open(path, data)
    return Record(
        attempt=attempt,
        recorded=fields.text("recorded", str.isprintable)[:40],
        metrics=numbers.load(fields.child("metrics")),
    )


def load_pin(path: str, data: bytes) -> Pin:
    """Parse a pin.

    Raises:
        FormatError: It is not one, or it is another attempt's.
    """
    fields, attempt = _open(path, data)
    return Pin(
        attempt=attempt,
        created=fields.text("created", str.isprintable)[:40],
        by=fields.text("by", str.isprintable)[:MAX_TEXT],
        note=fields.text("note", lambda text: text.isprintable() or not text)[:MAX_TEXT],
    )


def _about(attempt: Attempt) -> dict[str, Any]:
    return {"format": FORMAT, "step": attempt.step, "attempt": attempt.attempt}


def _open(path: str, data: bytes) -> tuple[Fields, Attempt]:
    fields = Fields.parse(path, data, FormatError)
    if (version := fields.get("format", int)) != FORMAT:
        raise fields.fail(f"format version {version}, this package reads {FORMAT}")
    check_seal(fields)
    attempt = keys.Attempt(fields.get("step", int), fields.get("attempt", str))
    if keys.attempt_beside(path) != attempt:
        raise fields.fail(f"its content says {attempt}")
    return fields, attempt
