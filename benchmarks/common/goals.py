"""What we want to reach, and whether this run shows it. All are ratios within the run."""

import os
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.peers import OURS

_DCP_ASYNC = ("dcp_thread", "dcp_process")


class Goal(NamedTuple):
    """One ratio.

    Attributes:
        what: Of what; its name in every table.
        found: In this run.
        wanted: The most it may be.
        against: Whose number it is a multiple of, as far as that differs between runs.
        least: ``wanted`` is the least it may be.
    """

    what: str
    found: float
    wanted: float
    against: str = ""
    least: bool = False

    @property
    def met(self):
        """Whether the number as it is shown is good enough."""
        found, wanted = round(self.found, 2), round(self.wanted, 2)
        return found >= wanted if self.least else found <= wanted

    @property
    def bound(self):
        """What is wanted, in words."""
        return f"at {'least' if self.least else 'most'} {self.wanted:.2f}"


def goals(rows):
    """A table for one setting, from its rows; empty where ours was not measured."""
    table = Table(title="goals", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "measured", "goal", "against", "met"):
        table.add_column(heading)
    for goal in of_saving(rows):
        table.add_row(goal.what, f"{goal.found:.2f}", goal.bound, goal.against, "yes" if goal.met else "NO")
    return table


def of_saving(rows):
    """The goals of one setting."""
    ours = next((row for row in rows if row["system"] == OURS), None)
    if ours is None:
        return
    limits = ours["limits"]
    whole = [row for row in rows if not row["system"].startswith(OURS) and not row["torn"]]
    asynchronous = [row for row in whole if row["system"].startswith(_DCP_ASYNC)]
    yield Goal("stall, of a memcpy of what a rank writes", ours["stall_s"] / limits["memcpy_s"], 1.25)
    yield from _best("visible, of the best other's", "visible_s", 1 / 5, whole)
    yield from _best("added to the loop, of the best other's", "added_s", 1 / 2, whole)
    yield Goal("added to the loop, of our CPU s / cores", ours["added_of_cpu"], 1.15)
    yield from _best("CPU s, of DCP async's best", "cpu_s_per_gib", 1 / 3, asynchronous)
    yield from _best("durable, of the best other's", "durable_s", 1 / 2, whole)
    yield Goal("durable, of a raw `O_DIRECT` writer's with fsync", ours["durable_s"] / limits["direct_s"], 1 / 0.85)
    yield Goal("training speed meanwhile, of undisturbed", ours["speed"], 0.95, _share(ours), least=True)
    if "memory" in ours:  # not of a run that was stopped
        yield Goal("host memory, of what is written", ours["memory"], 1.05)
    yield Goal("first save's stall, of later ones'", ours["first_stall_s"] / ours["stall_s"], 1.3)
    yield Goal("first save durable, of later ones", ours["first_of_later"], 1.3)


def _share(ours):
    """How much of the machine a save takes while it lasts."""
    share = ours["cpu_s_per_gib"] * ours["nbytes"] / 2**30 / os.cpu_count() / ours["durable_s"]
    return f"we use {share:.2f} of the cores meanwhile"


def _best(what, name, most, rows):
    """Against the best of the others, each in relation to ours of the same rounds."""
    others = [row for row in rows if row.get(name) and row["ours"].get(name)]
    if others:
        best = min(others, key=lambda row: row[name] / row["ours"][name])
        yield Goal(what, best["ours"][name] / best[name], most, best["label"])
