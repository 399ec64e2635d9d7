"""Several calls to a store side by side."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

S = TypeVar("S")
T = TypeVar("T")


def each(work: Callable[[S], T], items: Sequence[S], at_once: int) -> list[T]:
    """What ``work`` gives for each, in order, some at a time; the first error is raised."""
    if at_once == 1 or len(items) <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(at_once, thread_name_prefix="dcpsvc-store") as pool:
        return list(pool.map(work, items))
