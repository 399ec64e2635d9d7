"""The manifests of a run root as one LIST shows them, newest first, and which of them count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpsvc import fence
from dcpsvc.format import keys
from dcpsvc.storage.paging import pages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dcpsvc.format.epochs import Inheritance
    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Entry, Store


class Listed:
    """One LIST, of which no more pages are asked for than are looked at. Claims sort first, then the newest manifests.

    The newest inheritance is read only when somebody asks for an attempt from before it.

    Args:
        store: The run root.

    Raises:
        StoreError: The listing failed; so may every method. That is never "no checkpoints".
    """

    def __init__(self, store: Store) -> None:
        self._store, self._pages = store, pages(store, keys.MANIFESTS)
        self._entries: list[Entry] = []
        while self._one_more_page() and not (self._entries and self._entries[-1].key >= keys.COMMITS):
            pass
        named = (keys.epoch_of(entry.key) for entry in self._entries)
        self._inherited = max((epoch for epoch, inherited in filter(None, named) if inherited), default=keys.NO_EPOCH)
        self._inheritance: tuple[Inheritance | None] | None = None

    def _one_more_page(self) -> bool:
        page = next(self._pages, None)
        self._entries += page or ()
        return page is not None

    def __iter__(self) -> Iterator[Attempt]:
        """All that have a manifest, by step, largest first; those of one step in no certain order."""
        at = 0
        while at < len(self._entries) or self._one_more_page():
            for entry in self._entries[at:]:
                if (attempt := keys.attempt_of(entry.key)) is not None:
                    yield attempt
                at += 1

    @property
    def attempts(self) -> list[Attempt]:
        """The same, ascending by step, those of one step by epoch."""
        return sorted(self, key=lambda attempt: (attempt.step, attempt.epoch.number, attempt.attempt))

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
