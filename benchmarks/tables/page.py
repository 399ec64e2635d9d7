"""The page as a whole, and the two tables of it that README shows."""

import re
from pathlib import Path

from benchmarks.tables import saving, tools, transfer
from benchmarks.tables.markdown import result

_ROOT = Path(__file__).parents[2]
PAGE, README = _ROOT / "docs" / "benchmarks.md", _ROOT / "README.md"


def page():
    """docs/benchmarks.md."""
    facts = result("profile")["facts"]
    machine = (
        f"{facts['cores']} virtual cores ({facts['cpu']}), {facts['memory_gib']} GiB, "
        f"{facts['file_system'].split()[0]}, Linux {facts['kernel']}, Python {facts['python']}, "
        f"torch {facts['torch']}, no GPU."
    )
    head = ["# Benchmarks", _WORDS.format(machine=machine)]
    return "\n\n".join([*head, *saving.sections(), *transfer.sections(), *tools.sections()]) + "\n"


def with_tables(readme):
    """README with its tables as they are on the page: each is known by its headings."""
    for table in (saving.systems(saving.SETTINGS["FSDP2 x 1"]), saving.goals()):
        headings = table.partition("\n")[0]
        readme, count = re.subn(rf"{re.escape(headings)}\n(\|.*\n)+", lambda _, new=table: f"{new}\n", readme)
        if count != 1:
            raise ValueError(f"README has {count} tables with the headings {headings}")
    return readme


_WORDS = """Made by `python -m benchmarks.tables` from [benchmarks/results](../benchmarks/results). Ratios are within
one run; times are only for orientation. Machine: {machine} Each run names its command, its commit, and how busy
the machine was before it."""
