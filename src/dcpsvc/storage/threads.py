"""Several calls to a store side by side."""

from __future__ import annotations

from collections import deque
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dcpsvc.storage.base import ReadableStore

S = TypeVar("S")
T = TypeVar("T")


def at_once(store: ReadableStore) -> int:
    """How many small files to read side by side: an object store takes milliseconds for each, a disk takes none."""
    return 16 if "://" in store.url else 4


def each(work: Callable[[S], T], items: Sequence[S], at_once: int) -> list[T]:
    """What ``work`` gives for each, in order, some at a time.

    After an error nothing more begins, and what is under way ends. Of several errors the first in order is raised: what
    fails each time gives the same one each time, on every rank.
    """
    if at_once == 1 or len(items) <= 1:
        return [work(item) for item in items]
    left, found, failed = deque(enumerate(items)), dict[int, T](), dict[int, BaseException]()

    def go_through() -> None:
        for index, item in _taken(left):
            try:
                found[index] = work(item)
            except BaseException as err:  # whatever it is, nothing more begins; it is raised below
                left.clear()
                failed[index] = err
                raise

    with ThreadPoolExecutor(at_once, thread_name_prefix="dcpsvc-store") as pool:
        try:
            wait([pool.submit(go_through) for _ in range(min(at_once, len(items)))], return_when=FIRST_EXCEPTION)
        finally:  # an interrupt of this thread, too
            left.clear()
    if failed:
        raise failed[min(failed)]
    return [found[index] for index in range(len(items))]


def _taken(left: deque[S]) -> Iterator[S]:
    """Each to one of the threads that ask."""
    while True:
        try:
            item = left.popleft()
        except IndexError:
            return
        yield item
