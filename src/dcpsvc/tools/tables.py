"""How the command line shows what lies in a run root: rich tables. Imported by nothing but the command line."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from dcpsvc.progress import ranges, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dcpsvc.format.adapter import AdapterFolder
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.tools.comparing import Difference
    from dcpsvc.tools.listing import Row
    from dcpsvc.tools.numbers import Gap
    from dcpsvc.tools.showing import Shown
    from dcpsvc.tools.usage import Usage
    from dcpsvc.tools.verifying import Finding

_LOG_COLUMNS = 200
_MANY = 500
_SHARDS = 16
_HEAD = ["step", "attempt", "age", "size", "ranks", "tier", "state", "metrics / reason"]
_NUMBERS = frozenset({"step", "age", "size", "ranks"})
_SPARED = frozenset({"ranks", "tier"})
_NARROW = 120
"""Columns below which a terminal has no room for everything side by side."""
_TIGHT = 80
"""And those below which nothing has room beside the facts."""
_STYLES = {"committed": "green", "incomplete": "yellow"}


def console() -> Console:
    """Standard output; where it is no terminal, lines are long, for grep and for logs."""
    out = Console()
    return out if out.is_terminal else Console(width=max(out.width, _LOG_COLUMNS))


def age(created: datetime | None) -> str:
    """How long ago, in the largest unit that is not zero."""
    if created is None:
        return "-"
    seconds = max(0, int((datetime.now(UTC) - created).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def print_listing(rows: Sequence[Row]) -> None:
    """One line per checkpoint or attempt; a column in which nothing would stand is left out."""
    explained = any(row.reasons for row in rows)
    if len(rows) > _MANY:
        _print_plainly(rows)
        return
    out = console()
    if out.width < _TIGHT and rows:
        _print_below(out, rows)
        return
    narrow = out.width < _NARROW
    table = Table(box=None, pad_edge=False)
    for column in _facts(_HEAD[:-1], narrow=narrow):
        justify: Literal["left", "right"] = "right" if column in _NUMBERS else "left"
        table.add_column(column, justify=justify, no_wrap=True)
    for column in filter(None, _texts(_HEAD[-1], "kept because" if explained else "", narrow=narrow)):
        table.add_column(column, overflow="fold", min_width=16)
    for row in rows:
        texts = _texts(escape(_about(row)), escape(", ".join(row.reasons)), narrow=narrow)
        table.add_row(*_facts(_cells(row), narrow=narrow), *(texts if explained or narrow else texts[-1:]))
    out.print(table if rows else "no checkpoints")


def _facts(cells: list[str], *, narrow: bool) -> list[str]:
    """What a narrow terminal has room for: no ranks, no tier."""
    return [cell for cell, name in zip(cells, _HEAD, strict=False) if not (narrow and name in _SPARED)]


def _texts(about: str, why: str, *, narrow: bool) -> list[str]:
    """Why a checkpoint stays, and its metrics: beside each other, or below each other."""
    return ["\n".join(text for text in (why, about) if text)] if narrow else [why, about]


def _print_below(out: Console, rows: Sequence[Row]) -> None:
    """A line of facts for each, and below it why it stays, and its metrics."""
    lines = [_facts(_plain_cells(row), narrow=True) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for row, line in zip(rows, lines, strict=True):
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        style = _STYLES[row.checkpoint.state]
        out.print("  ".join(["step", *cells[:-1], f"[{style}]{line[-1]}[/]"]), highlight=False)
        for text in filter(None, (", ".join(row.reasons), _about(row))):
            out.print(Padding(escape(text), (0, 0, 0, 6)), highlight=False)


def _print_plainly(rows: Sequence[Row]) -> None:
    """The same without colours and folding: a table of ten thousand lines takes seconds."""
    lines = [_HEAD] + [[*_plain_cells(row), ", ".join([*row.reasons, _about(row)])] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.rjust(width) if name in _NUMBERS else cell.ljust(width)
            for cell, width, name in zip(line, widths, _HEAD, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _cells(row: Row) -> list[str]:
    *cells, state = _plain_cells(row)
    return [*cells, f"[{_STYLES[state]}]{state}[/]"]


def _plain_cells(row: Row) -> list[str]:
    found = row.checkpoint
    ranks = "-" if found.world_size is None else str(found.world_size)
    tiers = "+".join(row.tiers)
    return [str(found.step), found.attempt, age(found.created), size(found.nbytes), ranks, tiers, found.state]


def _about(row: Row) -> str:
    found = row.checkpoint
    return found.reason or "  ".join(f"{name}={value:.6g}" for name, value in found.metrics.items())


def print_checkpoint(shown: Shown, row: Row, pattern: str = "", dtype: str | None = None) -> None:
    """Facts, shards, and the tensors that :meth:`Shown.tensors` gives."""
    _print_facts(shown, row)
    _print_shards(shown.manifest)
    if shown.manifest.adapter is not None:
        _print_folder(shown.manifest.adapter)
    tensors = Table("tensor", "dtype", "shape", "size", "ranks", box=None, pad_edge=False)
    for key, tensor in shown.tensors(pattern, dtype).items():
        shape, ranks = str(list(tensor.shape)).replace("[", r"\["), ranges({chunk.rank for chunk in tensor.chunks})
        tensors.add_row(escape(key), tensor.dtype, shape, size(tensor.nbytes), ranks)
    for name, of in shown.aliases(pattern).items():
        tensors.add_row(escape(name), "", f"= {escape(of)}", "", "")
    console().print(tensors)


def _print_facts(shown: Shown, row: Row) -> None:
    out, manifest = console(), shown.manifest
    facts = {
        "step": manifest.step,
        "attempt": manifest.attempt,
        "created": manifest.created,
        "run": manifest.run_id,
        "ranks": manifest.world_size,
        "size": size(manifest.nbytes),
        "metrics": _about(row) or "-",
        "kept": ", ".join(row.reasons) or "everything is kept",
        "tier": "+".join(row.tiers),
        "versions": "  ".join(f"{name} {value}" for name, value in manifest.versions.items()),
        "layout": manifest.layout.path,
        "shards": manifest.key.data,  # once: with it each would be too long for a terminal
    }
    if shown.lineage is not None:
        facts["made"] = str(shown.lineage)
    for name, value in facts.items():
        out.print(f"[bold]{name:>9}[/]  {escape(str(value))}", highlight=False)


def _print_shards(manifest: Manifest) -> None:
    out = console()
    shards = Table("rank", "size", "xxh3-128 of its blocks", "shard", box=None, pad_edge=False)
    for column in shards.columns:
        column.overflow = "fold"
    for shard in manifest.shards[:_SHARDS]:
        shards.add_row(str(shard.rank), size(shard.nbytes), shard.digest, shard.path.removeprefix(manifest.key.data))
    out.print(shards)
    if (more := len(manifest.shards) - _SHARDS) > 0:
        out.print(f"... and {more} more shards; --json lists all", highlight=False)


def _print_folder(adapter: AdapterFolder) -> None:
    title = f"adapter folder of {escape(adapter.component)}"
    folder = Table("size", "xxh3-128", title, box=None, pad_edge=False)
    for file in adapter.files:
        folder.add_row(size(file.nbytes), file.digest, file.path)
    console().print(folder)


def print_findings(findings: list[Finding]) -> None:
    """A line per commit, and one per problem."""
    out = console()
    for finding in findings:
        if finding.gone:
            out.print(f"step {finding.step} (attempt {finding.attempt}): deleted meanwhile", highlight=False)
            continue
        word = "[green]intact[/]" if finding.intact else "[red]damaged[/]"
        out.print(
            f"step {finding.step} (attempt {finding.attempt}): {word}, {size(finding.nbytes)} read", highlight=False
        )
        for problem in finding.problems:
            out.print(f"  {escape(problem)}", highlight=False, soft_wrap=True)
    if not findings:
        out.print("no checkpoints")


def print_difference(found: Difference, named: tuple[str, str], *, with_values: bool) -> None:
    """What differs, by kind; the tensors that are furthest apart first."""
    out = console()
    if found.world_sizes[0] != found.world_sizes[1]:
        out.print("written by {} and {} ranks".format(*found.world_sizes), highlight=False)
    for title, names in ((f"only in {named[0]}", found.only_a), (f"only in {named[1]}", found.only_b)):
        _print_table(title, [(name,) for name in names], ("tensor",))
    _print_table("described otherwise", found.changed, ("tensor", "dtype, shape"))
    plain = [(path, _short(mine), _short(theirs)) for path, mine, theirs in found.plain]
    _print_table("other values", plain, ("value", *named))
    _print_table("other numbers", [_gap(gap) for gap in sorted(found.values, key=_distance)], _GAP_COLUMNS)
    if with_values:
        out.print(f"{found.equal} tensors are the same, bit for bit", highlight=False)
    else:
        said = "the same structure and values; " if found.same else ""
        out.print(f"{said}--values compares the tensors' numbers", highlight=False)
    if found.same and with_values:
        out.print("[green]no difference[/]")


_GAP_COLUMNS = ("tensor", "elements", "that differ", "largest", "relative")


def _gap(gap: Gap) -> tuple[str, ...]:
    largest, relative = (("-" if value is None else f"{value:.3g}") for value in (gap.largest, gap.relative))
    return gap.name, str(gap.elements), f"{gap.differing} ({gap.differing / gap.elements:.1%})", largest, relative


def _distance(gap: Gap) -> float:
    return -(gap.relative or 0.0)


def print_usage(found: Usage) -> None:
    """What takes how much."""
    rows = [(f"step {step}", attempt, size(nbytes)) for step, attempt, nbytes in found.checkpoints]
    _print_table("checkpoints", rows, ("", "attempt", "size"), right=1)
    debris = [(f"step {step}", attempt, size(nbytes)) for step, attempt, nbytes in found.debris]
    _print_table("under way, or debris", debris, ("", "attempt", "size"), right=1)
    components = [(name, size(nbytes)) for name, nbytes in found.components.items()]
    _print_table("tensors of the newest checkpoint", components, ("component", "size"), right=1)
    kinds = [(name, size(nbytes)) for name, nbytes in found.kinds.items()]
    _print_table("run root", [*kinds, ("total", size(found.total))], ("kind", "size"), right=1)
    if found.local:
        console().print(f"this node's disk: {size(found.local)}", highlight=False)


def _print_table(title: str, rows: Sequence[Sequence[str]], columns: Sequence[str], right: int = 0) -> None:
    if not rows:
        return
    console().print(f"[bold]{escape(title)}[/]", highlight=False)
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number >= len(columns) - right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console().print(table)


def _short(value: Any) -> str:
    return "-" if value is None else json.dumps(value)[:80]
