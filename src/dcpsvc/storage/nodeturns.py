"""Turns to transfer data that all processes of a node share: locked files, which the kernel unlocks when one dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import random
import socket
import threading
import time
from typing import TYPE_CHECKING

from dcpsvc.storage.posixfile import stranger

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

PATIENCE_S = 30.0
"""How long a process without any turn waits for one before it goes on without."""

_POLL_S = (0.002, 0.01)
_BEYOND = -1
_held: set[int] = set()
_log = logging.getLogger(__name__)


class NodeTurns:
    """So many transfers at once on this node, whichever of its processes they are of. Any thread.

    What an idle rank does not use a busy one has. The number is kept for the server's and the network's sake, and
    never stops a save: a process that has had no turn for ``patience_s``, because others stand still with theirs, takes
    one beyond the number; and where the files cannot be made nobody waits.

    Args:
        folder: Of the local tier.
        count: Of the turns.
        pause: Waits so many seconds; True, at once, if all is over.
        patience_s: See above.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        *,
        pause: Callable[[float], object] = time.sleep,
        patience_s: float = PATIENCE_S,
    ) -> None:
        # A folder that several nodes see would otherwise be shared by all of them.
        self._folder = folder / socket.gethostname()
        self._count, self._pause, self._patience_s = count, pause, patience_s
        self._line, self._counting = threading.Lock(), threading.Lock()
        self._taken = 0

    @contextlib.contextmanager
    def turn(self) -> Generator[None]:
        """One transfer; waits until the node has room for it."""
        # One thread of a process asks at a time: each process has the same chance, however many threads it has.
        with self._line:
            held = self._take()
            self._count_taken(1)
        try:
            yield
        finally:
            self._count_taken(-1)
            _give_back(held)

    def _take(self) -> int:
        deadline = time.monotonic() + self._patience_s
        try:
            self._make_folder()
            while (found := self._try_each()) is None:
                if time.monotonic() > deadline and not self._taken:
                    _log.info("event=turn_beyond_the_number of=%d waited_s=%.1f", self._count, self._patience_s)
                    return _BEYOND
                if self._pause(random.uniform(*_POLL_S)):  # noqa: S311 - no secret
                    return _BEYOND
        except OSError as err:
            _log.info("event=turns_not_shared folder=%s because=%s", self._folder, err)
            return _BEYOND
        return found

    def _make_folder(self) -> None:
        tier = self._folder.parent.parent
        tier.mkdir(mode=0o700, exist_ok=True)  # where no job has been yet
        if (owner := stranger(tier)) is not None:  # who could make links of the files
            raise PermissionError(errno.EPERM, f"the folder belongs to user {owner}", str(tier))
        self._folder.parent.mkdir(exist_ok=True)
        self._folder.mkdir(exist_ok=True)

    def _try_each(self) -> int | None:
        first = random.randrange(self._count)  # noqa: S311 - no secret
        for number in range(self._count):
            found = _try(self._folder / str((first + number) % self._count))
            if found is not None:
                return found
        return None

    def _count_taken(self, more: int) -> None:
        with self._counting:
            self._taken += more


def _try(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    _held.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        _give_back(descriptor)
        if not isinstance(err, BlockingIOError):
            raise
        return None
    return descriptor


def _give_back(descriptor: int) -> None:
    if descriptor in _held:
        _held.discard(descriptor)
        # Closing alone would leave it locked while a forked child has it open.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _forget_in_child() -> None:
    """A forked child (a data loader worker) would keep the turns of its parent when that has died."""
    for descriptor in tuple(_held):
        _held.discard(descriptor)
        os.close(descriptor)


os.register_at_fork(after_in_child=_forget_in_child)
