"""How the command line shows things: rich tables and a progress bar. Imported by nothing but the CLI."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from dcpsvc.stages.discover import Checkpoint
    from dcpsvc.tools.judging import Course, Verdict
    from dcpsvc.tools.live import LiveRank
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


def print_status(ranks: Sequence[LiveRank]) -> None:
    """One line per rank of a live job."""
    console, said = Console(), next((rank.status for rank in ranks if rank.status), {})
    if said:
        about = f"{said.get('root')}  world size {said.get('world_size')}  {said.get('next_save') or ''}"
        console.print(escape(about.rstrip()), highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("rank", "pid", "step", "newest", "committed", "failed", "skipped", "blocked"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("in flight", min_width=9)
    for rank in ranks:
        table.add_row(_or_dash(rank.rank), str(rank.pid), *_status_cells(rank))
    console.print(table)


def print_answer(answer: Mapping[str, Any], seconds: float) -> None:
    """What a live job did."""
    attempt = f" (attempt {answer['attempt']})" if answer.get("attempt") else ""
    step = "the job" if answer.get("step") is None else f"step {answer['step']}{attempt}"
    Console().print(f"{step}: {answer.get('state', 'done')}, {seconds:.1f} s", highlight=False, soft_wrap=True)


def print_verdict(verdict: Verdict) -> None:
    """What a drill showed, and what to do about it."""
    console, table = Console(), Table(box=None, pad_edge=False, show_header=False)
    for name, value in _course(verdict.course).items():
        table.add_row(name, escape(value))
    console.print(table)
    for problem, remedy in verdict.findings:
        console.print(f"[red]{escape(problem)}[/]", highlight=False, soft_wrap=True)
        console.print(f"  {escape(remedy)}", highlight=False, soft_wrap=True)
    if verdict.note:
        console.print(f"[yellow]{escape(verdict.note)}[/]", highlight=False, soft_wrap=True)
    console.print("[green]passed[/]" if verdict.passed else "[red]failed[/]")


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
