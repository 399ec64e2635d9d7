"""How the command line shows what ``dcpsvc gc`` would remove, and has removed."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from dcpsvc.progress import size
from dcpsvc.tools.leftovers import Doomed, Loose
from dcpsvc.tools.tables import console

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dcpsvc.tools.clearing import Cleared
    from dcpsvc.tools.leftovers import Leftovers
    from dcpsvc.tools.localtier import LocalLeftovers

_PLURALS = {"checkpoint": "checkpoints", "attempt": "attempts", "damaged": "damaged checkpoints"}


def print_plan(found: Leftovers, nearby: LocalLeftovers) -> None:
    """What would go and what stays, a line each, and what is freed."""
    table = Table("", "what", "size", "because", box=None, pad_edge=False)
    table.columns[2].justify = "right"
    table.columns[3].overflow = "fold"
    for attempt, why in found.keep.items():
        table.add_row("[green]stays[/]", f"step {attempt.step} {attempt.attempt}", "", escape(why))
    for name, why in found.spared.items():
        table.add_row("[green]stays[/]", escape(name), "", escape(why))
    for one in found.everything:
        table.add_row("[red]goes[/]", escape(_name(one)), size(one.nbytes), escape(one.why))
    for one in nearby.everything:
        table.add_row("[red]goes[/]", f"{escape(_name(one))} on this disk", size(one.nbytes), escape(one.why))
    if unfinished := found.unfinished + nearby.unfinished:
        table.add_row("[red]goes[/]", f"{unfinished} unfinished uploads", "?", "their writers are gone")
    if table.row_count:
        console().print(table)
    _say_whose(nearby)
    for remark in found.remarks:
        click.echo(remark)
    click.echo(f"policy: {found.policy or 'none is recorded; everything is kept (--keep gives one)'}")
    click.echo(f"{size(found.nbytes + nearby.nbytes)} would be freed")


def _say_whose(nearby: LocalLeftovers) -> None:
    if nearby.elsewhere:
        click.echo(f"this node's disk is left as it is: what it has of this run belongs to {nearby.elsewhere}")


def print_cleared(done: Cleared, nearby: LocalLeftovers, nbytes: int, remarks: Sequence[str] = ()) -> None:
    """What went, what could not, and what is odd."""
    _say_whose(nearby)
    for remark in remarks:
        click.echo(remark)
    removed = [*done.removed, *nearby.everything]
    for one in done.held:
        click.echo(f"{_name(one)} stays: somebody has begun to use it")
    unfinished = done.unfinished + nearby.unfinished
    said = [*_counted(removed), *([f"{unfinished} unfinished uploads"] if unfinished else [])]
    click.echo(f"removed {', '.join(said)}: {size(nbytes)} freed" if said else "nothing to remove")


def _counted(removed: Iterable[Doomed | Loose]) -> list[str]:
    kinds = Counter(one.kind for one in removed)
    return [f"{n} {kind if n == 1 else _PLURALS.get(kind, f'{kind}s')}" for kind, n in kinds.items()]


def _name(one: Doomed | Loose) -> str:
    if isinstance(one, Loose):
        return one.key
    return f"step {one.attempt.step} {one.attempt.attempt}"
