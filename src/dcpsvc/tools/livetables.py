"""How the command line shows a live job and a drill. Imported by nothing but the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from dcpsvc.tools.tables import console

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from dcpsvc.tools.judging import Course, Verdict
    from dcpsvc.tools.live import LiveRank

_STATUS = ("rank", "pid", "step", "newest", "committed", "failed", "skipped", "blocked")
_SPARED = frozenset({"pid", "committed", "skipped"})
_NARROW = 80
"""Columns below which a terminal has no room for those."""


def print_status(ranks: Sequence[LiveRank]) -> None:
    """One line per rank of a live job."""
    out, said = console(), next((rank.status for rank in ranks if rank.status), {})
    if said:
        about = f"{said.get('root')}  world size {said.get('world_size')}  {said.get('next_save') or ''}"
        out.print(escape(about.rstrip()), highlight=False, soft_wrap=True)
        if said.get("slowest"):
            out.print(escape(f"the newest commit waited for {said['slowest']}"), highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    spared = _SPARED if out.width < _NARROW else frozenset[str]()
    for column in filter(lambda name: name not in spared, _STATUS):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("in flight", min_width=9, overflow="fold")
    for rank in ranks:
        cells = zip((*_STATUS, ""), (_or_dash(rank.rank), str(rank.pid), *_status_cells(rank)), strict=True)
        table.add_row(*(cell for name, cell in cells if name not in spared))
    out.print(table)


def print_answer(answer: Mapping[str, Any], seconds: float) -> None:
    """What a live job did."""
    attempt = f" (attempt {answer['attempt']})" if answer.get("attempt") else ""
    step = "the job" if answer.get("step") is None else f"step {answer['step']}{attempt}"
    console().print(f"{step}: {answer.get('state', 'done')}, {seconds:.1f} s", highlight=False, soft_wrap=True)


def print_verdict(verdict: Verdict) -> None:
    """What a drill showed, and what to do about it."""
    out, table = console(), Table(box=None, pad_edge=False, show_header=False)
    for name, value in _course(verdict.course).items():
        table.add_row(name, escape(value))
    out.print(table)
    for problem, remedy in verdict.findings:
        out.print(f"[red]{escape(problem)}[/]", highlight=False, soft_wrap=True)
        out.print(f"  {escape(remedy)}", highlight=False, soft_wrap=True)
    if verdict.note:
        out.print(f"[yellow]{escape(verdict.note)}[/]", highlight=False, soft_wrap=True)
    out.print("[green]passed[/]" if verdict.passed else "[red]failed[/]")


def _status_cells(rank: LiveRank) -> list[str]:
    said = rank.status
    if not said:
        return ["-"] * 6 + [escape(rank.problem)]
    flight = ", ".join(f"step {save.get('step')}: {save.get('phase')}" for save in (said.get("in_flight") or ())) or "-"
    blocked = "-" if said.get("blocked_s") is None else f"{said['blocked_s']:.2f} s"
    counts = [_or_dash(said.get(name)) for name in ("step", "newest", "committed", "failed", "skipped")]
    return [*counts, blocked, escape(flight)]


def _course(seen: Course) -> dict[str, str]:
    """The rows of a drill's table; seconds count from the signal."""
    rows = {"run root": seen.root or seen.asked_root or "-", "exit code": _or_dash(seen.exit_code)}
    if seen.target:
        killed = f"killed after {seen.grace_s:.1f} s"
        rows = {
            "run root": seen.root,
            "signal": f"{seen.signal} to {seen.target} after step {seen.step_at_signal}",
            "agreed to stop": f"{_seconds(seen.agreed_s)}  after step {_or_dash(seen.stop_step)}",
            "save begun": _seconds(seen.staged_s),
            "on the local disks": f"{_seconds(seen.local_s)}  newest there: step {_or_dash(seen.newest_local)}",
            "committed": f"{_seconds(seen.committed_s)}  newest commit: step {_or_dash(seen.newest)}",
            "all processes ended": killed if seen.ended_s is None else _seconds(seen.ended_s),
            "exit code": _or_dash(seen.exit_code),
        }
    return rows


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)
