"""How the command line shows things: rich tables and a progress bar. Imported by nothing but the CLI."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from dcpsvc.stages.discover import Checkpoint
    from dcpsvc.tools.showing import Shown
    from dcpsvc.tools.verifying import Finding

_STYLES = {"committed": "green", "incomplete": "yellow"}


def size(nbytes: int) -> str:
    """Bytes in binary units: ``1.50 GiB``."""
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1024 and len(units) > 1:  # noqa: PLR2004 - what a KiB is
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.2f} {units[0]}"


def age(created: datetime | None) -> str:
    """How long ago, in the largest unit that is not zero."""
    if created is None:
        return "-"
    seconds = max(0, int((datetime.now(UTC) - created).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def print_listing(checkpoints: list[Checkpoint]) -> None:
    """One line per checkpoint or attempt."""
    table = Table(box=None, pad_edge=False)
    for column, justify in (
        ("step", "right"),
        ("attempt", "left"),
        ("age", "right"),
        ("size", "right"),
        ("ranks", "right"),
    ):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("state", no_wrap=True)
    table.add_column("metrics / reason", overflow="fold")
    for found in checkpoints:
        metrics = "  ".join(f"{name}={value:.6g}" for name, value in found.metrics.items())
        about = found.reason or metrics
        table.add_row(
            str(found.step),
            found.attempt,
            age(found.created),
            size(found.nbytes),
            "-" if found.world_size is None else str(found.world_size),
            f"[{_STYLES[found.state]}]{found.state}[/]",
            escape(about),
        )
    Console().print(table if checkpoints else "no checkpoints")


def print_checkpoint(shown: Shown, pattern: str) -> None:
    """Facts, shards, and the tensors whose name contains ``pattern``."""
    console, manifest = Console(), shown.manifest
    facts = {
        "step": manifest.step,
        "attempt": manifest.attempt,
        "created": manifest.created,
        "run": manifest.run_id,
        "ranks": manifest.world_size,
        "size": size(manifest.nbytes),
        "metrics": "  ".join(f"{name}={value:.6g}" for name, value in manifest.metrics.items()) or "-",
        "versions": "  ".join(f"{name} {value}" for name, value in manifest.versions.items()),
        "layout": manifest.layout.path,
    }
    for name, value in facts.items():
        console.print(f"[bold]{name:>9}[/]  {escape(str(value))}", highlight=False)
    shards = Table("rank", "size", "xxh3-128 of its blocks", "shard", box=None, pad_edge=False)
    for column in shards.columns:
        column.overflow = "fold"
    for shard in manifest.shards:
        shards.add_row(str(shard.rank), size(shard.nbytes), shard.digest, shard.path)
    console.print(shards)
    tensors = Table("tensor", "dtype", "shape", "size", "ranks", box=None, pad_edge=False)
    for key, tensor in sorted(shown.layout.tensors.items()):
        if pattern in key:
            ranks = ",".join(str(rank) for rank in sorted({chunk.rank for chunk in tensor.chunks}))
            tensors.add_row(
                escape(key), tensor.dtype, str(list(tensor.shape)).replace("[", r"\["), size(tensor.nbytes), ranks
            )
    for name, of in sorted(shown.layout.aliases.items()):
        if pattern in name:
            tensors.add_row(escape(name), "", f"= {escape(of)}", "", "")
    console.print(tensors)


def print_findings(findings: list[Finding]) -> None:
    """A line per commit, and one per problem."""
    console = Console()
    for finding in findings:
        word = "[green]intact[/]" if finding.intact else "[red]damaged[/]"
        console.print(
            f"step {finding.step} (attempt {finding.attempt}): {word}, {size(finding.nbytes)} proven", highlight=False
        )
        for problem in finding.problems:
            console.print(f"  {escape(problem)}", highlight=False, soft_wrap=True)
    if not findings:
        console.print("no checkpoints")


@contextmanager
def progress(total_nbytes: int, *, quiet: bool) -> Generator[Callable[[int], None]]:
    """A bar with bytes, rate and time left on stderr; nothing where that is no terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("verify", total=total_nbytes)
        yield lambda nbytes: bar.advance(task, nbytes)
