"""The root of the tree; options, places and waits that stop a job before or after its saves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankFailure:
    """What one rank says about its own failure; travels between ranks as JSON, never as an exception."""

    rank: int
    phase: str
    error: str
    """Name of the exception's type."""
    text: str

    def __str__(self) -> str:
        return f"rank {self.rank} failed in {self.phase}: {self.error}: {self.text}"


class DcpsvcError(Exception):
    """Root of the tree."""


class ConfigError(DcpsvcError):
    """An option that makes no sense, alone or beside another."""


class ClosedError(DcpsvcError):
    """The Checkpointer is closed, or was never opened."""


class WaitTimeoutError(DcpsvcError):
    """``wait()`` or ``close()`` ran out of time; what is pending goes on."""

    def __init__(self, waited_s: float, pending: tuple[str, ...]) -> None:
        super().__init__(waited_s, pending)
        self.waited_s, self.pending = waited_s, pending

    def __str__(self) -> str:
        return f"after {self.waited_s:.1f} s still waiting for: {', '.join(self.pending)}"


class RootError(DcpsvcError):
    """The run root, or the local tier, cannot be used; found before the first step."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where, self.reason = where, reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class NoRunError(RootError):
    """There is no run at that place."""


class UnsupportedFormatError(RootError):
    """The root was written by a format version this package does not read."""


class DestinationError(RootError):
    """A copy of a checkpoint cannot go there: the place holds another run, or a checkpoint of that step or later."""


class RunBusyError(RootError):
    """Another live process on this host is writing the same run."""
