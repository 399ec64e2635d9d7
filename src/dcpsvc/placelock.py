"""A rank's place on its node: a lock that the kernel lets go when the process dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import time
from typing import TYPE_CHECKING

from dcpsvc.errors import RunBusyError

if TYPE_CHECKING:
    from pathlib import Path

GRACE_S = 3.0
"""How long a process of the job before may take to die."""

_POLL_S = 0.05
_held: set[int] = set()


def take(path: Path) -> int:
    """Lock a file for this process; returns a descriptor for :func:`release`.

    Raises:
        RunBusyError: Another live process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + GRACE_S
    while not _try(descriptor):
        if time.monotonic() >= deadline:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            reason = f"process {holder or 'unknown'} on this host is writing the same run; stop it or use another root"
            raise RunBusyError(str(path.parent), reason)
        time.sleep(_POLL_S)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    _held.add(descriptor)
    return descriptor


def release(descriptor: int) -> None:
    """Let another process have the place. A second call does nothing."""
    if descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _forget_in_child() -> None:
    """A forked child (a data loader worker) shares the lock and would keep it when its parent has died."""
    for descriptor in tuple(_held):
        release(descriptor)


os.register_at_fork(after_in_child=_forget_in_child)
