"""Commands that look at a run root and change nothing: ls, show, verify, diff, du, report."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dcpsvc import progress
from dcpsvc.commandline.common import (
    EXIT_DAMAGED,
    Command,
    as_json_option,
    jobs_option,
    local_option,
    local_path,
    open_store,
    print_json,
    store_options,
)
from dcpsvc.commandline.steps import attempt_option, complete_attempt, number, pick, step_argument
from dcpsvc.tools import listing, showing, tables, verifying

if TYPE_CHECKING:
    from dcpsvc.commandline.steps import Step
    from dcpsvc.format.manifest import Manifest


@click.command("ls", cls=Command)
@click.argument("root")
@click.option("--committed", is_flag=True, help="Leave out attempts that are no checkpoint.")
@local_option
@store_options
@as_json_option
def ls_command(root: str, committed: bool, local: str | None, options: tuple[str, ...], as_json: bool) -> None:
    """List the checkpoints of the run at ROOT, a directory or URL.

    Examples:
      dcpsvc ls s3://bucket/runs/exp42
      dcpsvc ls ./runs/exp42 --json | jq '.[] | select(.metrics.loss < 2).step'
    """
    store = open_store(root, options)
    rows = listing.rows(store, local_path(store, local))
    if committed:
        rows = [row for row in rows if row.checkpoint.state == "committed"]
    if as_json:
        print_json([row.document() for row in rows])
    else:
        tables.print_listing(rows)


@click.command("show", cls=Command)
@click.argument("root")
@step_argument()
@attempt_option
@click.option(
    "--filter",
    "pattern",
    default="",
    metavar="TEXT",
    help="Tensors whose name contains TEXT, or is like *.bias.",
)
@click.option("--dtype", metavar="DTYPE", type=str.upper, help="Only tensors of this dtype, e.g. BF16.")
@store_options
@as_json_option
def show_command(
    root: str,
    step: Step,
    attempt: str | None,
    pattern: str,
    dtype: str | None,
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show the shards and tensors of the checkpoint of STEP, why it stays, and where it comes from.

    Exits with 1 if no tensor is what --filter and --dtype ask for.

    Examples:
      dcpsvc show ./runs/exp42 500
      dcpsvc show ./runs/exp42 500 --filter attn --json
    """
    store = open_store(root, options)
    found = pick(store, step, attempt)
    shown, row = showing.describe(store, found), listing.row_of(store, found.key, local_path(store, None))
    if as_json:
        print_json(shown.document(pattern, dtype) | row.document())
    else:
        tables.print_checkpoint(shown, row, pattern, dtype)
    if (pattern or dtype) and not shown.tensors(pattern, dtype) and not shown.aliases(pattern):
        click.echo("no tensor matches", err=True)
        sys.exit(EXIT_DAMAGED)


@click.command("verify", cls=Command)
@click.argument("root")
@step_argument(required=False)
@jobs_option
@click.option("--resume", is_flag=True, help="Leave out what a verify of ROOT that was cut short today has proven.")
@store_options
@as_json_option
def verify_command(
    root: str, step: Step | None, jobs: int, resume: bool, options: tuple[str, ...], as_json: bool
) -> None:
    """Read every byte of the checkpoint of STEP, or of all, and compare it with the manifest.

    Exits with 1 if anything is damaged. How far it is stands in $XDG_CACHE_HOME/dcpsvc until it has come to its end.

    Examples:
      dcpsvc verify s3://bucket/runs/exp42
      dcpsvc verify ./runs/exp42 500 --jobs 16 && echo whole
      dcpsvc verify s3://bucket/runs/exp42 --resume
    """
    from dcpsvc.tools.verifyjournal import Journal

    store = open_store(root, options)
    attempts = verifying.commits(store, None if step is None else number(store, step))
    with (
        Journal(store.url, resume=resume) as journal,
        progress.shown("verified", verifying.planned_nbytes(store, attempts), quiet=as_json) as advance,
    ):
        findings = verifying.verify(store, attempts, advance, at_once=jobs, journal=journal)
    if as_json:
        print_json([asdict(finding) | {"intact": finding.intact} for finding in findings])
    else:
        tables.print_findings(findings)
    well = all(finding.intact or (finding.gone and step is None) for finding in findings)
    sys.exit(0 if well else EXIT_DAMAGED)


@click.command("diff", cls=Command)
@click.argument("root")
@step_argument(name="a")
@step_argument(name="b")
@click.option("--root-b", metavar="ROOT", help="The run of B, if it is another one.")
@attempt_option
@click.option("--attempt-b", shell_complete=complete_attempt, help="Which attempt of B.")
@click.option("--values", is_flag=True, help="Read the tensors too, and say which differ and by how much.")
@store_options
@as_json_option
def diff_command(
    root: str,
    a: Step,
    b: Step,
    root_b: str | None,
    attempt: str | None,
    attempt_b: str | None,
    values: bool,
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Tell what differs between the checkpoints of steps A and B: tensors, dtypes, shapes, plain values.

    However many ranks wrote them. Exits with 1 if anything differs.

    Examples:
      dcpsvc diff ./runs/exp42 400 500
      dcpsvc diff ./runs/exp42 500 500 --root-b s3://bucket/runs/exp42 --values
      dcpsvc diff ./runs/exp42 500 500 --attempt 1-0badcafe-0
    """
    from dcpsvc.tools import comparing

    store, other = open_store(root, options), open_store(root_b or root, options)
    mine, theirs = (
        comparing.Side(where, found, showing.layout_of(where, found))
        for where, found in ((store, pick(store, a, attempt)), (other, pick(other, b, attempt_b, "--attempt-b")))
    )
    if values:
        with progress.shown("compared", comparing.compared_nbytes(mine, theirs), quiet=as_json) as advance:
            found = comparing.compare(mine, theirs, advance)
    else:
        found = comparing.compare(mine, theirs)
    if as_json:
        sides = {"a": mine.manifest.key._asdict(), "b": theirs.manifest.key._asdict()}
        print_json(sides | found.document())
    else:
        named = _named(mine.manifest, theirs.manifest, root_b)
        tables.print_difference(found, named, with_values=values)
    sys.exit(0 if found.same else EXIT_DAMAGED)


def _named(a: Manifest, b: Manifest, root_b: str | None) -> tuple[str, str]:
    """What tells the two apart: the step, else the attempt, and the run if it is another."""
    mine, theirs = (f"step {one.step}" for one in (a, b))
    if a.step == b.step and root_b is None:
        mine, theirs = (f"attempt {one.attempt}" for one in (a, b))
    return mine, theirs if root_b is None else f"{theirs} of {root_b}"


@click.command("du", cls=Command)
@click.argument("root")
@local_option
@store_options
@as_json_option
def du_command(root: str, local: str | None, options: tuple[str, ...], as_json: bool) -> None:
    """Tell what takes how much room: checkpoints, components, and what is not a checkpoint.

    Examples:
      dcpsvc du s3://bucket/runs/exp42
      dcpsvc du ./runs/exp42 --json | jq .kinds.debris
    """
    from dcpsvc.tools import usage

    store = open_store(root, options)
    found = usage.measure(store, local_path(store, local))
    if as_json:
        print_json(found.document())
    else:
        tables.print_usage(found)


def _no_url(_: click.Context, parameter: click.Parameter, output: Path) -> Path:
    """Elsewhere ``-o`` is KEY=VALUE; a path has lost one of the slashes of a URL."""
    if any(part.endswith(":") for part in output.parts):
        message = f"{str(output)!r} is no file to write; what fsspec needs is given as --option KEY=VALUE here"
        raise click.BadParameter(message, param=parameter)
    return output


@click.command("report", cls=Command)
@click.argument("root")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    callback=_no_url,
    show_default=True,
    metavar="FILE",
    help="The page.",
)
@click.option(
    "--log",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Logs of ranks on this machine, as RunLog(folder=DIR) writes them: of killed jobs, too.",
)
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Passed to fsspec (repeatable).")
@as_json_option
def report_command(root: str, output: Path, folder: Path | None, options: tuple[str, ...], as_json: bool) -> None:
    """Write one page about the run at ROOT that needs only a browser: times, ranks, metrics, sizes, failures.

    Times of saves, and of what training waited, are those that jobs with run_log=True have left in the run root.

    Examples:
      dcpsvc report s3://bucket/runs/exp42 -o exp42.html
      dcpsvc report ./runs/exp42 --log /var/log/exp42 && xdg-open report.html
    """
    from dcpsvc.tools import reporting

    aside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with aside.open("x", encoding="utf-8") as file:  # first: nothing is read for a page that cannot be written
            data = reporting.collect(open_store(root, options), folder=folder)
            file.write(reporting.page(data))
        aside.replace(output)
    except OSError as err:
        raise click.UsageError(f"{output} cannot be written: {err.strerror or err}") from err
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    nbytes, skipped = output.stat().st_size, data["skipped"]
    for each in skipped:
        click.echo(f"not read: {each}", err=True)
    if as_json:
        print_json({"output": str(output), "nbytes": nbytes, "skipped": skipped})
    else:
        click.echo(f"{output}: {progress.size(nbytes)}")
