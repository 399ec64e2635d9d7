"""A disk that may hang: what is asked of it ends in time, or is left behind."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, TypeVar

from dcpsvc.storage.wholefile import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from dcpsvc.deadline import Clock
    from dcpsvc.format.adapter import AdapterFile

T = TypeVar("T")


class BoundedDisk:
    """What this node's disk does, with a deadline. One thread.

    Args:
        clock: For the deadline.
        purpose: What the disk is asked for; for the error.
    """

    def __init__(self, clock: Clock, purpose: str) -> None:
        self._clock, self._purpose = clock, purpose
        self._limit_s = self._ends = 0.0

    def begin(self, limit_s: float) -> None:
        """All that it does from now on together, until this is called again, takes at most so long."""
        self._limit_s, self._ends = limit_s, self._clock.now() + limit_s

    def within(self, work: Callable[[], T]) -> T:
        """What the work gives; raises TimeoutError past the deadline, and leaves it behind."""
        left_s = self._ends - self._clock.now()
        try:
            if left_s > 0:
                return self._clock.bounded(work, left_s, "the disk")
        except TimeoutError:
            pass
        raise TimeoutError(f"this node's disk took longer than {self._limit_s:g} s over {self._purpose}")


class NewFiles:
    """Files that are written to such a disk and hashed on the way. One thread.

    Args:
        path: Where keys go on from.
        disk: Has been given time for whatever is called.
    """

    def __init__(self, path: Path, disk: BoundedDisk) -> None:
        self._path, self._disk = path, disk
        self._writers: list[Writer] = []

    def write(self, key: str, parts: Iterable[bytes | memoryview]) -> None:
        """One more. What ``parts`` waits for, and raises, is its own affair.

        Raises:
            StoreError: The disk does not take it.
            TimeoutError: Not in time.
        """
        writer = Writer(self._path / key, key)
        self._writers.append(writer)
        for part in parts:
            self._disk.within(functools.partial(writer.write, part))

    def finish(self) -> tuple[AdapterFile, ...]:
        """All of them, in the order of their names; durable when this returns.

        Raises:
            StoreError: The disk does not take them.
            TimeoutError: Not in time.
        """
        files = [self._disk.within(writer.finish) for writer in self._writers]
        return tuple(sorted(files, key=lambda file: file.path))

    def close(self) -> None:
        """They are whole, or nobody wants them. What hangs in one is left behind with the rest."""
        if self._writers:
            with contextlib.suppress(TimeoutError, OSError):  # something else has gone wrong before
                self._disk.within(self._close_all)

    def _close_all(self) -> None:
        for writer in self._writers:
            writer.close()
