"""Files of ours that do not say what they should."""

from __future__ import annotations

from dcpsvc.errors.service import DcpsvcError


class FormatError(DcpsvcError):
    """A file of ours that does not say what it should."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class ManifestError(FormatError):
    """Not a valid manifest, so not a checkpoint."""


class LayoutError(FormatError):
    """Not a valid layout."""


class CorruptShardError(FormatError):
    """Bytes of a shard that are missing or do not match their checksum."""
