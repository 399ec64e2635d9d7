"""Listings that come in parts, each a request: who needs only the first names asks for no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dcpsvc.storage.base import Entry, Store


class Page(NamedTuple):
    """A part of a listing.

    Attributes:
        entries: In the server's order.
        after: What to ask for the next part with; empty after the last one.
    """

    entries: list[Entry]
    after: str


@runtime_checkable
class PagingStore(Protocol):
    """A store whose listings take a request for each so many names."""

    def list_page(self, prefix: str, after: str) -> Page:
        """A part of what :meth:`Store.list` gives; the first if ``after`` is empty, else as the part before says."""
        ...


def list_page(store: Store, prefix: str, after: str) -> Page:
    """See :class:`PagingStore`; on a store that cannot, everything."""
    return store.list_page(prefix, after) if isinstance(store, PagingStore) else Page(store.list(prefix), "")


def pages(store: Store, prefix: str) -> Iterator[list[Entry]]:
    """What :meth:`Store.list` gives, sorted, in parts; none is asked for before the one before is used up."""
    found, after = list_page(store, prefix, "")
    if after and found != sorted(found):  # S3's directory buckets list in no order
        yield store.list(prefix)
        return
    yield sorted(found)
    while after:
        found, after = list_page(store, prefix, after)
        yield found
