"""Stores at a place where there may be a file instead of a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from dcpsvc.storage.base import Store


@runtime_checkable
class PlacedStore(Protocol):
    """A store at a place where there may be a file instead of a folder."""

    def is_file(self) -> bool:
        """Whether the run root itself is a file, or an object; False as well where nobody may look."""
        ...


def is_file(store: Store) -> bool:
    """See :class:`PlacedStore`; False on a store that has no such place."""
    return isinstance(store, PlacedStore) and store.is_file()
