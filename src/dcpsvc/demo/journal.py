"""What a training process of the demo says about itself: one JSON object a line, written while it runs."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    from dcpsvc import Event, PendingSave


class Kill(NamedTuple):
    """A point of a checkpoint's life at which one rank is to die."""

    phase: str
    """Name of the event."""
    step: int
    rank: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``PHASE:STEP:RANK``."""
        phase, step, rank = text.split(":")
        return cls(phase, int(step), int(rank))

    def __str__(self) -> str:
        return f"{self.phase}:{self.step}:{self.rank}"


class Journal:
    """One rank's end of the file; rank 0 tells the story, the others only that they live, and that they die.

    Every line is one ``write`` to a file opened for appending, so lines of several ranks and threads never mix.
    """

    def __init__(self, path: Path, rank: int, kill: Kill | None = None) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._rank, self._kill = rank, kill
        self._write("started", rank=rank, pid=os.getpid())

    def resumed(self, step: int) -> None:
        """The run continues after ``step``; 0 is a fresh start."""
        self._tell("resumed", step=step)

    def step(self, step: int, loss: float) -> None:
        """One step is done; the loss is kept as hex too, because only that shows every bit."""
        self._tell("step", step=step, loss=loss, loss_hex=loss.hex())

    def event(self, event: Event) -> None:
        """Callback for ``Checkpointer(on_event=...)``; this is where the demo's victim dies."""
        if (event.name, event.step, event.rank) == self._kill:
            self._write("killed", phase=event.name, step=event.step, rank=event.rank, attempt=event.attempt)
            os.kill(os.getpid(), signal.SIGKILL)
        self._tell("event", name=event.name, step=event.step, attempt=event.attempt, nbytes=event.nbytes)

    def save(self, pending: PendingSave) -> None:
        """Report a save once it is over, well or badly."""

        def report(_committed: Future[None]) -> None:
            timings = pending.timings
            self._tell(
                "save",
                step=pending.step,
                attempt=pending.attempt,
                nbytes=timings.nbytes,
                blocked_ms=timings.blocked_s * 1e3,
                local_s=timings.local_s,
                commit_lag_s=timings.commit_lag_s,
                state=pending.state,
            )

        pending.committed.add_done_callback(report)

    def done(self) -> None:
        """The run is over and everything is flushed."""
        self._tell("done")

    def _tell(self, kind: str, **fields: object) -> None:
        if self._rank == 0:
            self._write(kind, **fields)

    def _write(self, kind: str, **fields: object) -> None:
        os.write(self._file, (json.dumps({"kind": kind, **fields}) + "\n").encode())


@dataclass(kw_only=True)
class Story:
    """What a run's journal says so far."""

    pids: dict[int, int] = field(default_factory=dict[int, int])
    """Process id of every rank that started."""
    resumed: int | None = None
    losses: dict[int, str] = field(default_factory=dict[int, str])
    """Loss of every step, as hex."""
    last_loss: float | None = None
    committed: list[int] = field(default_factory=list[int])
    saves: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    killed: Kill | None = None
    killed_attempt: str = ""
    done: bool = False

    def take(self, line: dict[str, Any]) -> None:
        """Add one line of the journal."""
        match line:
            case {"kind": "started", "rank": rank, "pid": pid}:
                self.pids[rank] = pid
            case {"kind": "resumed", "step": step}:
                self.resumed = step
            case {"kind": "step", "step": step, "loss": loss, "loss_hex": loss_hex}:
                self.losses[step], self.last_loss = loss_hex, loss
            case {"kind": "event", "name": "committed", "step": step}:
                self.committed.append(step)
            case {"kind": "save"}:
                self.saves.append(line)
            case {"kind": "killed", "phase": phase, "step": step, "rank": rank, "attempt": attempt}:
                self.killed, self.killed_attempt = Kill(phase, step, rank), attempt
            case {"kind": "done"}:
                self.done = True
            case _:
                pass


class Tail:
    """Follows a journal that is still being written."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> list[dict[str, Any]]:
        """Lines completed since the last call; none while the file does not exist."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [json.loads(line) for line in complete.splitlines()]
