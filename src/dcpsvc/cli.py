"""The command ``dcpsvc``: thin over :mod:`dcpsvc.tools`. Imports torch only where a command needs it.

Exit codes: 0 all is well; 1 a checkpoint is damaged or missing, a save failed, or the demo or drill did; 2 wrong
usage; 3 the run root cannot be used; 4 no live job of this run on this host.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dcpsvc.errors import DcpsvcError, RootError, StoreAccessError, StoreError
from dcpsvc.reading import open_root
from dcpsvc.stages import discover
from dcpsvc.tools import live, showing, tables, verifying

if TYPE_CHECKING:
    from dcpsvc.storage.base import Store

EXIT_DAMAGED, EXIT_UNUSABLE, EXIT_NOT_LIVE = 1, 3, 4

_SECONDS = click.FloatRange(min=0, min_open=True)

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
_options = click.option(
    "-o",
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Passed to fsspec, e.g. -o endpoint_url=http://127.0.0.1:9000 (repeatable).",
)
_timeout = click.option(
    "--timeout",
    "timeout_s",
    type=_SECONDS,
    default=3600.0,
    show_default=True,
    metavar="S",
    help="Longest wait for the answer, in seconds; what was asked stands all the same.",
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 well, 1 damaged, missing or not saved, 2 usage, 3 root unusable, 4 no live job of this run "
    "on this host.",
)
@click.version_option(package_name="dcpsvc")
def cli() -> None:
    """List, show and verify the checkpoints of a training run; control a live job; rehearse its end (demo, drill)."""


@cli.command("ls")
@click.argument("root")
@click.option("--committed", is_flag=True, help="Leave out attempts that are no checkpoint.")
@_options
@_json
def ls_command(root: str, committed: bool, options: tuple[str, ...], as_json: bool) -> None:
    """List the checkpoints of the run at ROOT, a directory or URL.

    Example: dcpsvc ls s3://bucket/runs/exp42
    """
    found = discover.listing(_open(root, options))
    if committed:
        found = [checkpoint for checkpoint in found if checkpoint.state == "committed"]
    if as_json:
        _print_json([showing.listed(checkpoint) for checkpoint in found])
    else:
        tables.print_listing(found)


@cli.command("show")
@click.argument("root")
@click.argument("step", type=click.IntRange(min=0))
@click.option("--attempt", help="Which attempt, where a step has several commits.")
@click.option("--filter", "pattern", default="", metavar="TEXT", help="Only tensors whose name contains TEXT.")
@_options
@_json
def show_command(
    root: str, step: int, attempt: str | None, pattern: str, options: tuple[str, ...], as_json: bool
) -> None:
    """Show the shards and tensors of the checkpoint of STEP.

    Example: dcpsvc show ./runs/exp42 500 --filter attn
    """
    shown = showing.show(_open(root, options), step, attempt)
    if as_json:
        _print_json(shown.document())
    else:
        tables.print_checkpoint(shown, pattern)


@cli.command("verify")
@click.argument("root")
@click.argument("step", type=click.IntRange(min=0), required=False)
@_options
@_json
def verify_command(root: str, step: int | None, options: tuple[str, ...], as_json: bool) -> None:
    """Read every byte of the checkpoint of STEP, or of all, and compare it with the manifest.

    Exits with 1 if anything is damaged. Example: dcpsvc verify s3://bucket/runs/exp42
    """
    store = _open(root, options)
    attempts = verifying.commits(store, step)
    total = verifying.planned_nbytes(store, attempts)
    with tables.progress(total, quiet=as_json) as advance:
        findings = [verifying.verify(store, attempt, advance) for attempt in attempts]
    if as_json:
        _print_json([_finding(finding) for finding in findings])
    else:
        tables.print_findings(findings)
    sys.exit(0 if all(finding.intact for finding in findings) else EXIT_DAMAGED)


@cli.command("status")
@click.argument("root")
@_options
@_json
def status_command(root: str, options: tuple[str, ...], as_json: bool) -> None:
    """Show how the live job of the run at ROOT is doing: its ranks on this host.

    Example: dcpsvc status s3://bucket/runs/exp42
    """
    found = live.ranks(live.run_id(root, _parse(options)))
    if not found:
        raise live.NoLiveJobError(root)
    if as_json:
        _print_json([rank.document() for rank in found])
    else:
        tables.print_status(found)


@cli.command("save")
@click.argument("root")
@_timeout
@_options
@_json
def save_command(root: str, timeout_s: float, options: tuple[str, ...], as_json: bool) -> None:
    """Have the live job of the run at ROOT save; returns when that is committed.

    Works on any host of the job. Example: dcpsvc save ./runs/exp42
    """
    _ask({"command": "save"}, root, timeout_s, options, as_json=as_json)


@cli.command("stop")
@click.argument("root")
@click.option("--no-save", is_flag=True, help="Stop without a save; what is in flight is finished.")
@click.option("--abort", is_flag=True, help="Stop without a save, and abandon what is in flight.")
@_timeout
@_options
@_json
def stop_command(
    root: str, no_save: bool, abort: bool, timeout_s: float, options: tuple[str, ...], as_json: bool
) -> None:
    """Have the live job of the run at ROOT save and stop; returns when that save is committed.

    Works on any host of the job. Example: dcpsvc stop ./runs/exp42
    """
    if no_save and abort:
        raise click.UsageError("--abort never saves: give one of --no-save and --abort")
    asked = {"command": "abort"} if abort else {"command": "stop", "save": not no_save}
    _ask(asked, root, timeout_s, options, as_json=as_json)


@cli.group("drill")
def drill_group() -> None:
    """Rehearse what a cluster does to a job, with the job's own command."""


@drill_group.command("sigterm", context_settings={"allow_interspersed_args": False})
@click.option("--root", help="The job's run root. Default: the first one that the command opens on this host.")
@click.option("--after-step", "after_steps", type=click.IntRange(min=1), default=3, show_default=True, metavar="N")
@click.option("--signal", "name", type=click.Choice(["TERM", "USR1"]), default="TERM", show_default=True)
@click.option("--to", type=click.Choice(["rank", "launcher"]), default="rank", show_default=True, help="Who gets it.")
@click.option("--grace", "grace_s", type=_SECONDS, default=30.0, show_default=True, metavar="S")
@click.option("--start", "start_s", type=_SECONDS, default=600.0, show_default=True, metavar="S")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@_options
@_json
def drill_sigterm_command(
    name: str, command: tuple[str, ...], options: tuple[str, ...], as_json: bool, **choices: Any
) -> None:
    """Run COMMAND, and after N steps send one of its ranks SIGTERM, as a preemption does; then judge what is left.

    The job has S seconds (--grace) to save and to end, before it is killed; it must make its first steps within
    --start. Exits with 1 if work would be lost, or the job does not end. Example: dcpsvc drill sigterm -- torchrun
    --nproc-per-node 2 train.py
    """
    from dcpsvc.tools import drill

    plan = drill.Drill(command=command, signum=drill.SIGNALS[name], storage_options=_parse(options), **choices)
    try:
        verdict = drill.run(plan, sys.stderr.buffer if as_json else None, lambda line: click.echo(line, err=True))
    except OSError as err:
        raise click.UsageError(f"{command[0]}: {err.strerror or err}") from err
    if as_json:
        _print_json(verdict.document())
    else:
        tables.print_verdict(verdict)
    sys.exit(0 if verdict.passed else EXIT_DAMAGED)


@cli.command("demo")
@click.option("--root", help="Where the checkpoints go: a directory or URL. Default: inside --dir.")
@click.option("--parallel", type=click.Choice(["fsdp", "ddp", "none"]), default="fsdp", show_default=True)
@click.option("--ranks", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option("--steps", type=click.IntRange(min=3), default=60, show_default=True)
@click.option("--every", type=click.IntRange(min=1), default=20, show_default=True, help="Steps between two saves.")
@click.option("--dir", "directory", type=click.Path(file_okay=False), help="Where logs and the default root go.")
@click.option("--tamper", is_flag=True, hidden=True, help="Resume with another dropout: the comparison must notice.")
@_options
@_json
def demo_command(directory: str | None, tamper: bool, options: tuple[str, ...], **choices: Any) -> None:
    """Train a small GPT, SIGKILL a rank in the middle of a save, resume, and compare every loss bit by bit.

    Exits with 1 if a single step differs from the run that was never interrupted.
    """
    from pathlib import Path

    from dcpsvc.demo.run import run_demo

    keep_dir = Path(directory) if directory else None
    sys.exit(run_demo(keep_dir=keep_dir, storage_options=_parse(options), break_resume=tamper, **choices))


def main() -> NoReturn:
    """Run the command line; errors of ours become one line and an exit code."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as err:
        err.show()
        sys.exit(err.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (DcpsvcError, live.LiveError) as err:
        click.echo(f"dcpsvc: {err}", err=True)
        if remedy := _remedy(err):
            click.echo(f"        {remedy}", err=True)
        sys.exit(next((code for kind, code in _EXITS.items() if isinstance(err, kind)), EXIT_DAMAGED))
    sys.exit(0)


def _open(root: str, options: tuple[str, ...]) -> Store:
    return open_root(root, _parse(options))


def _parse(options: tuple[str, ...]) -> dict[str, Any]:
    """``KEY=VALUE``, values in JSON where they are JSON: true, 3, {"a": 1}."""
    parsed: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{option!r} is not KEY=VALUE", param_hint="-o")
        try:
            parsed[key] = json.loads(value)
        except ValueError:
            parsed[key] = value
    return parsed


def _ask(asked: dict[str, Any], root: str, timeout_s: float, options: tuple[str, ...], *, as_json: bool) -> None:
    began = time.monotonic()
    rank = live.speaker(root, _parse(options))
    answer = live.command(rank, asked, timeout_s, lambda step: click.echo(f"all ranks act after step {step}", err=True))
    if as_json:
        _print_json(answer)
    else:
        tables.print_answer(answer, time.monotonic() - began)


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=1))


def _finding(finding: verifying.Finding) -> dict[str, Any]:
    return asdict(finding) | {"intact": finding.intact}


_EXITS: dict[type[Exception], int] = {
    RootError: EXIT_UNUSABLE,
    StoreError: EXIT_UNUSABLE,
    live.NoLiveJobError: EXIT_NOT_LIVE,
}
_REMEDIES: dict[type[Exception], str] = {
    RootError: "A run root holds run.json; the path is what the training script gave to Checkpointer(...).",
    StoreAccessError: "Check permissions and credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE, -o key=... -o secret=...).",
    live.NoLiveJobError: "Ask on a host of the job, as the job's user.",
}


def _remedy(err: Exception) -> str:
    return next((text for kind, text in _REMEDIES.items() if isinstance(err, kind)), "")
