"""Telling somebody else's object from our own, whose answer got lost.

A server can store an object and die before it says so; the resent request then finds the object taken. Objects
written with ``create`` hold a token of the attempt that wrote them, so identical bytes mean: it was us.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpsvc.errors import StoreNotFoundError

if TYPE_CHECKING:
    from dcpsvc.storage.base import Store


def holds(store: Store, key: str, data: bytes) -> bool:
    """Whether the object under ``key`` is exactly ``data``; False where there is none any more.

    Raises:
        StoreError: The store cannot say.
    """
    try:
        return store.size(key) == len(data) and store.read(key, 0, len(data)) == data
    except StoreNotFoundError:
        return False
