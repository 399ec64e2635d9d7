"""Results as one table with ratios, as JSON, and as a file."""

import json
import tempfile
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.common.facts import facts
from benchmarks.common.rounds import measure
from benchmarks.peers import SYSTEMS

_MARKS = {
    "TORN": "what came back is not what was saved: not compared",
    "*": "does not fsync; that is added to its durable time",
}


@dataclass(frozen=True)
class Column:
    """One number of a row.

    Attributes:
        title: Above it.
        name: In the row.
        digits: After the point.
        of_ours: Show as a multiple of ours too.
        limit: Show as a multiple of that limit too.
    """

    title: str
    name: str
    digits: int = 3
    of_ours: bool = False
    limit: str = ""

    def headings(self):
        """The number, and its ratios."""
        yield self.title
        if self.of_ours:
            yield "x ours"
        if self.limit:
            yield f"x {self.limit.removesuffix('_s')}"

    def cells(self, row):
        """As :meth:`headings`."""
        value = row.get(self.name)
        yield "-" if value is None else f"{value:.{self.digits}f}"
        if self.of_ours:
            yield _ratio(None if row["torn"] else value, row["ours"].get(self.name))
        if self.limit:
            yield _ratio(None if row["torn"] else value, row["limits"].get(self.limit))


def compare(options, exercises, columns, *, derive=lambda row: row, also=None, **how):
    """Measure every setting, and report.

    Args:
        options: See :mod:`benchmarks.common.options`.
        exercises: See :func:`~benchmarks.common.rounds.measure`.
        columns: Of the table.
        derive: Adds numbers to a row.
        also: Lines to print below the table of a setting, from its rows.
        how: To :func:`~benchmarks.common.rounds.measure`.
    """
    result = {"facts": facts(options.dir or tempfile.gettempdir(), {"mib": options.mib, "rounds": options.rounds})}
    result["settings"] = {}
    for setting in options.settings:
        rows = measure(options, setting, exercises, **how)
        for row in rows:
            for one in (row, row["ours"]):
                if one and "skipped" not in one:
                    derive(one)
        result["settings"][str(setting)] = rows
        if options.stopped:
            break
    write(options, result, lambda console: _tables(console, result, columns, also))


def write(options, result, draw):
    """To the screen as ``draw`` does it or as JSON, and to a file if one is named."""
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result, indent=1))
        return
    console = Console(width=max(180, Console().width))
    console.print("  ".join(f"{name}: {value}" for name, value in result["facts"].items()), highlight=False)
    draw(console)


def _tables(console, result, columns, also):
    for setting, rows in result["settings"].items():
        measured = [row for row in rows if "skipped" not in row]
        table = Table(title=f"{setting}, {result['facts']['mib']} MiB", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("system", no_wrap=True)
        for column in columns:
            for heading in column.headings():
                table.add_column(heading, justify="right")
        for row in measured:
            table.add_row(_name(row), *(cell for column in columns for cell in column.cells(row)))
        console.print(table)
        console.print(_limits(rows), highlight=False)
        for mark, meaning in _MARKS.items():
            if any(mark in _name(row) for row in measured):
                console.print(f"{mark}: {meaning}", highlight=False)
        if also:
            console.print(also(measured))
        for row in rows:
            if "skipped" in row:
                console.print(f"{row['label']}: skipped: {row['skipped']}", highlight=False, markup=False)


def _name(row):
    unsynced = "" if SYSTEMS[row["system"]].fsyncs else " *"
    return row["label"] + unsynced + (" TORN" if row["torn"] else "")


def _limits(rows):
    limits = next((row["limits"] for row in rows if row["limits"]), {})
    gib = next((row["nbytes"] / 2**30 for row in rows if row.get("nbytes")), 0)
    told = (f"{name.removesuffix('_s')} {s:.3f} s ({gib / s:.1f} GiB/s)" for name, s in limits.items())
    return "limits of this machine: " + ", ".join(told)


def _ratio(value, base):
    return f"{value / base:.2f}" if value is not None and base else "-"
