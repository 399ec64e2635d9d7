"""Who owned a run root, and what each owner found there: two small sealed documents for each start of a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc.errors import FormatError
from dcpsvc.format.keys import Attempt, Epoch, attempt_of, epoch_of
from dcpsvc.format.manifest import FORMAT
from dcpsvc.format.parse import Fields
from dcpsvc.format.seal import check_seal, seal

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_NBYTES = 64 << 20
MAX_CLAIM_NBYTES = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A job takes the run root over.

    Attributes:
        epoch: Larger than any before.
        host: Where its coordinator runs.
        pid: Of its coordinator.
        created: UTC time, ISO 8601.
    """

    epoch: Epoch
    host: str
    pid: int
    created: str

    def __str__(self) -> str:
        return f"job {self.epoch.token} (epoch {self.epoch.number}, process {self.pid} on {self.host}, {self.created})"

    def dumps(self) -> bytes:
        """The file's content."""
        about = {"host": self.host, "pid": self.pid, "created": self.created}
        return seal({"format": FORMAT, "epoch": self.epoch.number, "token": self.epoch.token, **about})


@dataclass(frozen=True, slots=True, kw_only=True)
class Inheritance:
    """What counts of the time before an epoch: nothing else that older jobs write counts any more."""

    epoch: Epoch
    attempts: frozenset[Attempt]

    def counts(self, attempt: Attempt) -> bool:
        """Whether an attempt's manifest makes a checkpoint."""
        made = attempt.epoch
        return made.number == 0 or made >= self.epoch or attempt in self.attempts

    def dumps(self) -> bytes:
        """The file's content."""
        inherited = [attempt.manifest for attempt in sorted(self.attempts)]
        return seal({"format": FORMAT, "epoch": self.epoch.number, "token": self.epoch.token, "inherited": inherited})


def load_claim(path: str, data: bytes) -> Claim:
    """Parse a claim.

    Raises:
        FormatError: It is not one.
    """
    fields, epoch = _open(path, data)
    return Claim(
        epoch=epoch,
        host=fields.text("host", str.isprintable)[:200],
        pid=fields.count("pid", 2**31),
        created=fields.text("created", str.isprintable)[:40],
    )


def load_inheritance(path: str, data: bytes) -> Inheritance:
    """Parse an inheritance.

    Raises:
        FormatError: It is not one.
    """
    fields, epoch = _open(path, data)
    return Inheritance(epoch=epoch, attempts=frozenset(_inherited(fields)))


def _inherited(fields: Fields) -> Iterator[Attempt]:
    for key in fields.get("inherited", list):
        attempt = attempt_of(key) if isinstance(key, str) else None
        if attempt is None or attempt.manifest != key:
            raise fields.fail("names something that is no manifest")
        yield attempt


def _open(path: str, data: bytes) -> tuple[Fields, Epoch]:
    fields = Fields.parse(path, data, FormatError)
    if (version := fields.get("format", int)) != FORMAT:
        raise fields.fail(f"format version {version}, this package reads {FORMAT}")
    check_seal(fields)
    named = epoch_of(path)
    epoch = Epoch(fields.get("epoch", int), fields.get("token", str))
    if named is None or named[0] != epoch:
        raise fields.fail(f"its content says epoch {epoch.number} of {epoch.token[:40]!r}")
    return fields, epoch
