"""What the demo shows while it runs, and its table at the end."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from rich.console import Console

    from dcpsvc.demo.journal import Story


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One attempt to save one step, as the run saw it and as the run root shows it afterwards."""

    step: int
    attempt: str
    state: str
    nbytes: int | None = None
    blocked_ms: float | None = None
    """What the training thread lost."""
    local_s: float | None = None
    """From ``save()`` to durable on the local tier."""
    commit_lag_s: float | None = None
    """From ``save()`` to the commit."""

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of ``_COLUMNS``."""
        nbytes = "-" if self.nbytes is None else f"{self.nbytes:,}"
        timings = (self.blocked_ms, self.local_s, self.commit_lag_s)
        texts = ["-" if value is None else f"{value:.2f}" for value in timings]
        color = "green" if self.state == "committed" else "red"
        return (str(self.step), nbytes, *texts, f"[{color}]{self.state}[/]")


_COLUMNS = ("step", "bytes", "blocked ms", "local s", "commit lag s", "state")


class Screen(Protocol):
    """Where the demo's words go."""

    def say(self, text: str) -> None:
        """One line of the story, with rich markup."""
        ...

    def follow(self, name: str, steps: int) -> Callable[[Story], None]:
        """Show a new run of ``steps`` steps; the result is called with its story again and again."""
        ...

    def table(self, rows: Sequence[Row]) -> None:
        """The checkpoints, at the end."""
        ...


class Silent:
    """Shows nothing: the caller prints one document at the end."""

    def say(self, text: str) -> None:
        """Drop the line."""

    def follow(self, name: str, steps: int) -> Callable[[Story], None]:  # noqa: ARG002 - the Screen protocol
        """Watch nothing."""
        return lambda _story: None

    def table(self, rows: Sequence[Row]) -> None:
        """Drop the table."""


class Plain:
    """One line for each thing worth a line; for a pipe, a file, a CI log."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @classmethod
    @contextmanager
    def opened(cls, console: Console) -> Generator[Self]:
        """A screen for as long as the block runs."""
        yield cls(console)

    def say(self, text: str) -> None:
        """Print the line."""
        self._console.print(text, soft_wrap=True, highlight=False)

    def follow(self, name: str, steps: int) -> Callable[[Story], None]:  # noqa: ARG002 - the Screen protocol
        """Print a line whenever the run's note changes."""
        last = ""

        def watch(story: Story) -> None:
            nonlocal last
            if (note := _note(story)) and note != last:
                last = note
                self.say(f"{name}: {note}")

        return watch

    def table(self, rows: Sequence[Row]) -> None:
        """Print the checkpoints."""
        table = Table(*_COLUMNS, header_style="bold")
        for column in table.columns[:-1]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row.cells())
        self._console.print(table)


class Live(Plain):
    """One progress bar a run; fits a terminal of 80 columns."""

    def __init__(self, console: Console, progress: Progress) -> None:
        super().__init__(console)
        self._progress = progress

    @classmethod
    @contextmanager
    def opened(cls, console: Console) -> Generator[Self]:
        """A screen whose bars are drawn until the table, or the end of the block."""
        texts = TextColumn("{task.fields[loss]:<10}"), TextColumn("{task.fields[note]}")
        columns = TextColumn("{task.description:<9}"), BarColumn(16), MofNCompleteColumn(), *texts
        with Progress(*columns, console=console) as progress:
            yield cls(console, progress)

    def follow(self, name: str, steps: int) -> Callable[[Story], None]:
        """Add a bar."""
        task: TaskID = self._progress.add_task(name, total=steps, loss="", note="starting")

        def watch(story: Story) -> None:
            if story.resumed is None:
                return
            loss = "" if story.last_loss is None else f"loss {story.last_loss:.3f}"
            done = max(story.losses, default=story.resumed)
            self._progress.update(task, completed=done, loss=loss, note=_note(story))

        return watch

    def table(self, rows: Sequence[Row]) -> None:
        """Print the checkpoints below the bars."""
        self._progress.stop()
        super().table(rows)


def _note(story: Story) -> str:
    """The newest thing worth saying about a run, with rich markup."""
    if story.killed:
        return f"[bold red]rank {story.killed.rank} killed saving step {story.killed.step}[/]"
    if story.committed:
        return f"[green]step {story.committed[-1]} committed[/]"
    if story.resumed:
        return f"[cyan]resumed from step {story.resumed}[/]"
    return ""
