"""How the command line shows what ``dcpsvc gc`` would remove, and has removed."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from dcpsvc.progress import size
from dcpsvc.tools.clearplan import Doomed, Loose
from dcpsvc.tools.listing import LOCAL, REMOTE
from dcpsvc.tools.tables import console

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dcpsvc.tools.clearing import Cleared
    from dcpsvc.tools.clearplan import Leftovers
    from dcpsvc.tools.localtier import LocalLeftovers

_PLURALS = {"checkpoint": "checkpoints", "attempt": "attempts", "damaged": "damaged checkpoints"}


def print_plan(found: Leftovers, nearby: LocalLeftovers) -> None:
    """What would go and what stays, a line each, and how much that is."""
    table = _table()
    for attempt, why in found.keep.items():
        _stays(table, f"step {attempt.step} {attempt.attempt}", found.sizes.get(str(attempt)), why)
    for name, why in found.spared.items():
        _stays(table, name, found.sizes.get(name), why)
    for one in (*found.everything, *nearby.everything):
        table.add_row("[red]goes[/]", escape(_name(one)), one.tier, size(one.nbytes), escape(one.why))
    for tier, unfinished in ((REMOTE, found.unfinished), (LOCAL, nearby.unfinished)):
        if unfinished:
            table.add_row("[red]goes[/]", f"{unfinished} unfinished uploads", tier, "?", "their writers are gone")
    if table.row_count:
        console().print(table)
    _say_whose(nearby)
    for remark in found.remarks:
        click.echo(remark)
    click.echo(f"policy: {found.policy or 'none is recorded; everything is kept (--keep gives one)'}")
    click.echo(f"{size(found.nbytes + nearby.nbytes)} would be freed{_by_tier(found.nbytes, nearby.nbytes)}")
    staying = _by_tier(found.staying_nbytes, nearby.staying_nbytes)
    click.echo(f"{size(found.staying_nbytes + nearby.staying_nbytes)} stay{staying}")


def _table() -> Table:
    table = Table("", "what", "tier", "size", "because", box=None, pad_edge=False)
    table.columns[3].justify = "right"
    table.columns[4].overflow = "fold"
    return table


def _stays(table: Table, name: str, nbytes: int | None, why: str) -> None:
    table.add_row("[green]stays[/]", escape(name), REMOTE, "" if nbytes is None else size(nbytes), escape(why))


def _by_tier(remote: int, local: int) -> str:
    """Nothing where all of it is at the run root."""
    return f" ({REMOTE} {size(remote)}, {LOCAL} {size(local)})" if local else ""


def _say_whose(nearby: LocalLeftovers) -> None:
    if nearby.elsewhere:
        click.echo(f"this node's disk is left as it is: what it has of this run belongs to {nearby.elsewhere}")


def print_cleared(done: Cleared, nearby: LocalLeftovers, nbytes: int, remarks: Sequence[str] = ()) -> None:
    """What went, what could not, and what is odd."""
    removed = [*done.removed, *nearby.everything]
    table = _table()
    for one in removed:
        table.add_row("[red]gone[/]", escape(_name(one)), one.tier, size(one.nbytes), escape(one.why))
    if removed:
        console().print(table)
    _say_whose(nearby)
    for remark in remarks:
        click.echo(remark)
    for one in done.held:
        click.echo(f"{_name(one)} stays: somebody has begun to use it")
    unfinished = done.unfinished + nearby.unfinished
    said = [*_counted(removed), *([f"{unfinished} unfinished uploads"] if unfinished else [])]
    freed = f"{size(nbytes)} freed{_by_tier(done.nbytes, nbytes - done.nbytes)}"
    click.echo(f"removed {', '.join(said)}: {freed}" if said else "nothing to remove")


def _counted(removed: Iterable[Doomed | Loose]) -> list[str]:
    kinds = Counter(one.kind for one in removed)
    return [f"{n} {kind if n == 1 else _PLURALS.get(kind, f'{kind}s')}" for kind, n in kinds.items()]


def _name(one: Doomed | Loose) -> str:
    if isinstance(one, Loose):
        return one.key
    return f"step {one.attempt.step} {one.attempt.attempt}"
