"""How far a long operation is: a bar with bytes, rate and time left on a terminal, a quiet line elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

Watch = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Is told how many bytes there are to do, and gives what to call with each number of bytes just done."""

EVERY_S = 10.0
"""Between two lines where nobody watches: a log must not fill with them."""


def size(nbytes: float) -> str:
    """Bytes in binary units: ``1.50 GiB``."""
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1024 and len(units) > 1:  # noqa: PLR2004 - what a KiB is
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.2f} {units[0]}"


def duration(seconds: float) -> str:
    """Seconds for people: ``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004 - what a minute is
        return f"{seconds:.3g} s" if seconds < 10 else f"{whole} s"  # noqa: PLR2004 - more digits tell nothing
    if whole < 3600:  # noqa: PLR2004 - what an hour is
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers for people: ``0-3, 7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


class Lines:
    """Says now and then how far it is, a line each. Any thread.

    Args:
        what: What is done, such as ``verified``.
        total_nbytes: All there is to do.
        say: Where lines go.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, what: str, total_nbytes: int, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._total, self._say, self._clock = what, total_nbytes, say, clock
        self._began = self._said = clock()
        self._done = 0
        self._lock = threading.Lock()

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""
        with self._lock:
            self._done += nbytes
            now = self._clock()
            if now - self._said < EVERY_S:
                return
            self._said = now
            rate = self._done / (now - self._began)
            left = duration(max(0, self._total - self._done) / rate) if rate else "?"
            text = f"{self._what} {size(self._done)} of {size(self._total)}, {size(rate)}/s, {left} left"
        self._say(text)


@contextmanager
def unseen(total_nbytes: int) -> Generator[Callable[[int], None]]:
    """For whom nobody watches: a :data:`Watch`."""
    del total_nbytes
    yield lambda _: None


@contextmanager
def shown(
    what: str, total_nbytes: int, *, quiet: bool = False, say: Callable[[str], object] | None = None
) -> Generator[Callable[[int], None]]:
    """Give what to call with each number of bytes just done, from any thread.

    Args:
        what: What is done, such as ``verified``.
        total_nbytes: All there is to do.
        quiet: Say nothing at all.
        say: Where lines go instead of stderr, if that is no terminal.
    """
    if quiet:
        yield lambda _: None
        return
    if say is not None and not sys.stderr.isatty():
        yield Lines(what, total_nbytes, say).advance
        return
    from rich.console import Console  # takes longer to load than a small checkpoint

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(what, total_nbytes, lambda line: console.print(line, highlight=False, soft_wrap=True)).advance
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}", style="progress.data.speed")  # rich's own counts in powers of ten
    columns = (TextColumn(what), BarColumn(), DownloadColumn(binary_units=True), rate, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total_nbytes, rate="?")

        def advance(nbytes: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, advance=nbytes, rate=f"{size(speed)}/s" if speed else "?")

        yield advance
