"""Telling a deletion from damage: a reader misses files, and the manifest, with which every deletion begins."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from dcpsvc.errors import FormatError, StepDeletedError, StoreNotFoundError
from dcpsvc.format import keys
from dcpsvc.listed import Listed
from dcpsvc.storage.base import is_there

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Store


@contextlib.contextmanager
def noticed(store: Store, *attempts: Attempt) -> Generator[None]:
    """What seems damaged in here is told as deleted where that is what it is.

    Args:
        store: The run root.
        attempts: Checkpoints there that are read meanwhile.

    Raises:
        StepDeletedError: Instead of a FormatError or StoreNotFoundError, if one of them is there no more.
    """
    try:
        yield
    except (FormatError, StoreNotFoundError) as err:
        for attempt in attempts:
            if not is_there(store, attempt.manifest):
                raise error(store, attempt) from err
        raise


def error(store: Store, attempt: Attempt, *, was_committed: bool = True) -> StepDeletedError:
    """What there is to say about a checkpoint that is there no more. Three requests.

    Args:
        store: The run root.
        attempt: The checkpoint.
        was_committed: Somebody has seen its manifest; a mark alone may be that of a save which failed.
    """
    left = sum(entry.nbytes for entry in store.list(attempt.data))
    steps = tuple(sorted({one.step for one in Listed(store).counting()}))
    marked = is_there(store, attempt.tombstone)
    return StepDeletedError(store.url, attempt.step, steps, attempt.attempt, marked, left, was_committed)


def check_step(store: Store, step: int, attempt: str | None = None, seen: Sequence[Attempt] = ()) -> None:
    """Raises StepDeletedError if a step was ``seen`` and is deleted since, or files of it wait for being deleted.

    Of those nothing tells whether they were ever committed. What was seen, and is there still, is something else.
    """
    for one in seen:
        if not is_there(store, one.manifest):
            raise error(store, one)
    for one in () if seen else condemned(store):
        if one.step != step or attempt not in {None, one.attempt} or is_there(store, one.manifest):
            continue
        if (found := error(store, one, was_committed=False)).left_nbytes:
            raise found


def condemned(store: Store) -> list[Attempt]:
    """Attempts whose deletion somebody has begun, and perhaps broken off; and saves that have failed. One LIST."""
    marked = (keys.attempt_of(entry.key) for entry in store.list(keys.TOMBSTONES))
    return [attempt for attempt in marked if attempt is not None]
