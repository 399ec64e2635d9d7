"""The manifests of a run root as one LIST shows them, and which of them count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpsvc import fence
from dcpsvc.format import keys

if TYPE_CHECKING:
    from dcpsvc.format.epochs import Inheritance
    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Store


class Listed:
    """One LIST. The newest inheritance is read only when somebody asks for an attempt from before it.

    Args:
        store: The run root.

    Attributes:
        attempts: All that have a manifest, ascending by step, those of one step by epoch.

    Raises:
        StoreError: The listing failed. That is never "no checkpoints".
    """

    def __init__(self, store: Store) -> None:
        self._store, self._entries = store, store.list(keys.MANIFESTS)
        named = (keys.epoch_of(entry.key) for entry in self._entries)
        self._inherited = max((epoch for epoch, inherited in filter(None, named) if inherited), default=keys.NO_EPOCH)
        self._inheritance: tuple[Inheritance | None] | None = None
        found = [attempt for entry in self._entries if (attempt := keys.attempt_of(entry.key)) is not None]
        self.attempts = sorted(found, key=lambda attempt: (attempt.step, attempt.epoch.number, attempt.attempt))

    def counts(self, attempt: Attempt) -> bool:
        """Whether its manifest makes a checkpoint, or is that of a job that had been replaced.

        Raises:
            StoreError: The inheritance could not be read.
        """
        if attempt.epoch >= self._inherited:  # whichever inheritance can be read, it is not newer
            return True
        if self._inheritance is None:
            self._inheritance = (fence.newest_inheritance(self._store, self._entries),)
        (inheritance,) = self._inheritance
        return inheritance is None or inheritance.counts(attempt)

    def counting(self) -> list[Attempt]:
        """Those that count; raises as :meth:`counts` does."""
        return [attempt for attempt in self.attempts if self.counts(attempt)]
