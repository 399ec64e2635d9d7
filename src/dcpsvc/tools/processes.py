"""A command and everything it starts: who of them lives, and an end to all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from types import FrameType

END_S = 10.0
"""How long killed processes may take to be gone."""
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    parent: int
    session: int
    started: int
    """In ticks since the machine started: with the number it names a process for good."""

    def is_same(self, other: _Process | None) -> bool:
        """Whether both are one process, whatever became of its parent and session."""
        return other is not None and (self.pid, self.started) == (other.pid, other.started)


class Family:
    """A command, its descendants, and whoever is in a session of one of them.

    Looked at often enough (:meth:`look`), nobody escapes: torchrun gives each rank a session of its own, and a process
    whose parent has died stays in its session.

    Attributes:
        launcher: The command itself.
        alive: Process ids at the last look.
    """

    def __init__(self, launcher: subprocess.Popen[bytes]) -> None:
        self.launcher = launcher
        self._members: dict[int, _Process] = {}
        self._sessions = {launcher.pid}
        self.look()

    @property
    def alive(self) -> frozenset[int]:
        """Process ids at the last look."""
        return frozenset(self._members)

    def look(self) -> frozenset[int]:
        """Who is alive now."""
        running = _running()
        members = {pid: process for pid, process in running.items() if process.is_same(self._members.get(pid))}
        sessions = set(self._sessions)
        while joined := [
            process
            for pid, process in running.items()
            if pid not in members and (process.session in sessions or process.parent in members)
        ]:
            members |= {process.pid: process for process in joined}
            sessions |= {process.session for process in joined}
        self._members, self._sessions = members, {process.session for process in members.values()}
        self.launcher.poll()  # after the look: until it is reaped, its number is not given to a stranger
        return self.alive

    def kill(self) -> None:
        """End whoever is alive; bounded."""
        deadline = time.monotonic() + END_S
        while self.look() and time.monotonic() < deadline:
            for pid in self.alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_POLL_S)
        with suppress(subprocess.TimeoutExpired):
            self.launcher.wait(_POLL_S)


@contextmanager
def family(command: Sequence[str], output: IO[bytes] | None = None) -> Generator[Family]:
    """Run a command in a session of its own; whatever ends this block also ends every process of it.

    Args:
        command: And its arguments.
        output: Where its standard output goes; None: to ours.

    Raises:
        OSError: It cannot be started.
    """
    with _sigterm_raises():
        launcher = subprocess.Popen(  # noqa: S603 - the user's own command line
            command, stdin=subprocess.DEVNULL, stdout=output, start_new_session=True
        )
        started = Family(launcher)
        try:
            yield started
        finally:
            started.kill()


@contextmanager
def _sigterm_raises() -> Generator[None]:
    """Let SIGTERM unwind this process, as Ctrl-C does, instead of leaving the command running without it."""

    def unwind(signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    try:
        before = signal.signal(signal.SIGTERM, unwind)
    except ValueError:  # not the main thread: no signal arrives here
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _running() -> dict[int, _Process]:
    """Every process that is not a zombie."""
    found = (_read(path) for path in Path("/proc").iterdir() if path.name.isdecimal())
    return {process.pid: process for process in found if process is not None}


def _read(directory: Path) -> _Process | None:
    """Source: proc_pid_stat(5); the name, which may hold anything, stands in parentheses."""
    try:
        text = (directory / "stat").read_text(errors="replace")
    except OSError:
        return None
    state, parent, _, session, *rest = text[text.rindex(")") + 1 :].split()
    if state in {"Z", "X"}:
        return None
    return _Process(int(directory.name), int(parent), int(session), int(rest[15]))
