"""What a store says no to."""

from __future__ import annotations

from dcpsvc.errors.service import DcpsvcError


class StoreError(DcpsvcError):
    """The store said no. ``where`` is a key or URL without credentials."""

    transient = False
    """Whether the same call may succeed later."""

    def __init__(self, operation: str, where: str, reason: str) -> None:
        super().__init__(operation, where, reason)
        self.operation, self.where, self.reason = operation, where, reason

    def __str__(self) -> str:
        return f"{self.operation} {self.where}: {self.reason}"


class StoreNotFoundError(StoreError):
    """No object under that key."""


class StoreObjectError(StoreError):
    """What lies under that key is no object of ours: too large, too short, no regular file."""


class NoBucketError(StoreError):
    """No bucket of that name is there; none is ever created."""


class StoreAccessError(StoreError):
    """Credentials or permissions do not allow it."""


class StoreFullError(StoreError):
    """No space left."""


class StoreUnavailableError(StoreError):
    """A passing condition: throttled, reset, timed out."""

    transient = True


class StoreThrottledError(StoreUnavailableError):
    """The server asks for fewer requests."""
