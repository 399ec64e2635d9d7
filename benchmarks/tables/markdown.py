"""What the page consists of: tables, which run they are of, and whether a goal is met."""

import json
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def result(name):
    """A run of the past."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(headings, rows):
    """The first column to the left, numbers to the right."""
    lines = [headings, ["---", *("--:" for _ in headings[1:])], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def goals(found):
    """A table of them; what is not met is bold."""
    return table(["goal", "wanted", "measured"], [[each.what, bound(each), measured(each)] for each in found])


def bound(goal):
    """What is wanted."""
    return f"{'≥' if goal.least else '≤'} {goal.wanted:.2f}"


def measured(goal):
    """What was found; bold where that is not good enough."""
    return f"{goal.found:.2f}" if goal.met else f"**{goal.found:.2f}**"


def run(name):
    """Which run, of which commit, and how busy the machine had been before."""
    facts = result(name)["facts"]
    where = f"[{name}.json](../benchmarks/results/{name}.json)"
    return f"`{facts['command']}` at {facts['commit']}, load before it {facts['load_before']}: {where}."
