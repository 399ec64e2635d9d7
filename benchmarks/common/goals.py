"""What we want to reach, and whether this run shows it. All are ratios within the run."""

import os

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.peers import OURS

_DCP_ASYNC = ("dcp_thread", "dcp_process")


def goals(rows):
    """A table for one setting, from its rows; empty where ours was not measured."""
    ours = next((row for row in rows if row["system"] == OURS), None)
    table = Table(title="goals", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "measured", "goal", "against", "met"):
        table.add_column(heading)
    for what, measured, most, against in _found(ours, rows) if ours else ():
        table.add_row(what, f"{measured:.2f}", f"at most {most:.2f}", against, "yes" if measured <= most else "NO")
    return table


def _found(ours, rows):
    limits = ours["limits"]
    whole = [row for row in rows if not row["system"].startswith(OURS) and not row["torn"]]
    yield "stall, changed at once", ours["stall_s"] / limits["memcpy_s"], 1.25, "memcpy into touched memory"
    yield from _best("visible, changed in the next step", "visible_s", 1 / 5, whole)
    yield from _best("added to the loop", "added_s", 1 / 2, whole)
    yield "added to the loop", ours["added_of_cpu"], 1.15, "our CPU s / cores"
    asynchronous = [row for row in whole if row["system"].startswith(_DCP_ASYNC)]
    yield from _best("CPU s per GiB", "cpu_s_per_gib", 1 / 3, asynchronous)
    yield from _best("durable", "durable_s", 1 / 2, whole)
    yield "durable", ours["durable_s"] / limits["direct_s"], 1 / 0.85, "raw O_DIRECT writer with fsync"
    share = ours["cpu_s_per_gib"] * ours["nbytes"] / 2**30 / os.cpu_count() / ours["durable_s"]
    yield (
        "slowdown during",
        1 - ours["speed"],
        0.05,
        f"undisturbed training (we use {share:.2f} of the cores meanwhile)",
    )
    if "memory" in ours:  # not of a run that was stopped
        yield "memory", ours["memory"], 1.05, "the state"
    yield "first save, stall", ours["first_stall_s"] / ours["stall_s"], 1.3, "later ones"
    yield "first save, durable", ours["first_of_later"], 1.3, "later ones"


def _best(what, name, most, rows):
    """Against the best of the others, each in relation to ours of the same rounds."""
    others = [row for row in rows if row.get(name) and row["ours"].get(name)]
    if others:
        best = min(others, key=lambda row: row[name] / row["ours"][name])
        yield what, best["ours"][name] / best[name], most, best["label"]
