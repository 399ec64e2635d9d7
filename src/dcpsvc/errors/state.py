"""State that cannot be saved or loaded as declared."""

from __future__ import annotations

from dcpsvc.errors.service import DcpsvcError


class StateError(DcpsvcError):
    """Something in the state cannot be saved or loaded as declared."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class UnsupportedStateError(StateError):
    """An object that is neither a tensor nor JSON-like; nothing is pickled, so it is refused."""


class SharingError(StateError):
    """A declaration of who holds what that this rank, or another component of the state, contradicts."""


class StateMismatchError(StateError):
    """The checkpoint and the state in memory do not fit; nothing in memory was changed."""


class StructureMismatchError(StateMismatchError):
    """Keys, shapes or dtypes of the checkpoint and the state differ. The reason is a table of all differences."""


class TornSnapshotError(StateError):
    """A tensor was changed while it was being copied; what was copied is never published."""
