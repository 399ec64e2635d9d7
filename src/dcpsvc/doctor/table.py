"""The examination as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from dcpsvc.doctor.findings import Verdict, worst
from dcpsvc.progress import duration, size
from dcpsvc.tools.tables import console

if TYPE_CHECKING:
    from dcpsvc.doctor.examination import Examination
    from dcpsvc.doctor.forecast import Forecast

_STYLES = {Verdict.OK: "green", Verdict.NOTE: "cyan", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


def print_examination(found: Examination) -> None:
    """A line for each thing, its remedy below it, and what to expect."""
    out = console()
    ranks = "1 rank" if found.ranks == 1 else f"{found.ranks} ranks"
    out.print(f"{escape(found.root)}, {ranks}", highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found.findings:
        table.add_row(f"[{_STYLES[finding.verdict]}]{finding.verdict}[/]", finding.name, escape(finding.found))
        if finding.remedy:
            table.add_row("", "", f"[italic]-> {escape(finding.remedy)}[/]")
    out.print(table)
    if found.forecast is not None:
        for line in expectations(found.forecast):
            out.print(line, highlight=False, soft_wrap=True)
    verdict = worst(found.findings)
    words = {Verdict.FAIL: "jobs do not work here", Verdict.WARN: "jobs work here; see the warnings"}
    out.print(f"[{_STYLES[verdict]}]{words.get(verdict, 'all is well')}[/]")


def expectations(found: Forecast) -> list[str]:
    """What saves of the model will cost, and how often to make them."""
    times = (found.stall_s, found.local_s, found.commit_s, found.mtbf_s, found.interval_s)
    stall, local, commit, mtbf, interval = (duration(seconds) for seconds in times)
    ranks = "1 rank" if found.ranks == 1 else f"{found.ranks} ranks"
    alike = "" if found.step is None else f", like step {found.step} there"
    what = f"a checkpoint of {size(found.model_nbytes)} on {ranks}{alike}"
    advice = f"with a failure every {mtbf}, save every {interval} of training"
    return [
        f"{what}: training waits about {stall}, on the local disks after {local}, committed after {commit}",
        f"{advice}: {found.lost:.2%} of the time goes into saves, and into what failures have read and trained again",
    ]
