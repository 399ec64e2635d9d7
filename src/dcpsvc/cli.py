"""The command ``dcpsvc``: thin over :mod:`dcpsvc.tools`. Imports torch only where a command needs it.

Exit codes: 0 all is well; 1 a checkpoint is damaged or missing, a save failed, or the demo or drill did; 2 wrong
usage; 3 the run root cannot be used; 4 no live job of this run on this host.
"""

from __future__ import annotations

import sys
import time
from typing import Any, NoReturn

import click
from click.shell_completion import get_completion_class

from dcpsvc.commandline import (
    checking,
    clearing,
    exporting,
    failures,
    importing,
    looking,
    mending,
    noting,
    transferring,
)
from dcpsvc.commandline.common import (
    EXIT_DAMAGED,
    SECONDS,
    Asked,
    Group,
    as_json_option,
    parse,
    print_json,
    store_options,
)
from dcpsvc.storage.names import redact
from dcpsvc.tools import live, livetables

_timeout = click.option(
    "--timeout",
    "timeout_s",
    type=SECONDS,
    default=3600.0,
    show_default=True,
    metavar="S",
    help="Longest wait for the answer, in seconds; what was asked stands all the same.",
)


_SECTIONS = {
    "Look": ("ls", "show", "diff", "du", "verify", "report", "doctor"),
    "Change": ("pin", "unpin", "edit", "promote", "gc"),
    "Live job": ("status", "save", "stop", "drill"),
    "Move": ("fetch", "cp", "export", "import"),
    "Set up": ("demo", "completion"),
}


@click.group(
    cls=Group,
    sections=_SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="dcpsvc")
def cli() -> None:
    """List, show, compare and verify the checkpoints of a training run; control a live job; rehearse its end."""


for _command in (
    looking.ls_command,
    looking.show_command,
    looking.verify_command,
    looking.diff_command,
    looking.du_command,
    transferring.fetch_command,
    transferring.cp_command,
    looking.report_command,
    checking.doctor_command,
    exporting.export_command,
    importing.import_command,
    mending.edit_command,
    mending.promote_command,
    noting.pin_command,
    noting.unpin_command,
    clearing.gc_command,
):
    cli.add_command(_command)


@cli.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print what makes SHELL complete commands, options and the steps of a run root.

    Examples:
      eval "$(dcpsvc completion bash)"
      dcpsvc completion fish > ~/.config/fish/completions/dcpsvc.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 - click has all three
    click.echo(kind(cli, {}, "dcpsvc", "_DCPSVC_COMPLETE").source())


@cli.command("status")
@click.argument("root")
@store_options
@as_json_option
def status_command(root: str, options: tuple[str, ...], as_json: bool) -> None:
    """Show how the live job of the run at ROOT is doing: its ranks on this host.

    Examples:
      dcpsvc status s3://bucket/runs/exp42
    """
    found = live.ranks(live.run_id(root, parse(options)))
    if not found:
        raise live.NoLiveJobError(redact(root))
    if as_json:
        print_json([rank.document() for rank in found])
    else:
        livetables.print_status(found)


@cli.command("save")
@click.argument("root")
@_timeout
@store_options
@as_json_option
def save_command(root: str, timeout_s: float, options: tuple[str, ...], as_json: bool) -> None:
    """Have the live job of the run at ROOT save; returns when that is committed.

    Works on any host of the job.

    Examples:
      dcpsvc save ./runs/exp42
    """
    _ask({"command": "save"}, root, timeout_s, options, as_json=as_json)


@cli.command("stop")
@click.argument("root")
@click.option("--no-save", is_flag=True, help="Stop without a save; what is in flight is finished.")
@click.option("--abort", is_flag=True, help="Stop without a save, and abandon what is in flight.")
@_timeout
@store_options
@as_json_option
def stop_command(
    root: str, no_save: bool, abort: bool, timeout_s: float, options: tuple[str, ...], as_json: bool
) -> None:
    """Have the live job of the run at ROOT save and stop; returns when that save is committed.

    Works on any host of the job.

    Examples:
      dcpsvc stop ./runs/exp42
    """
    if no_save and abort:
        raise click.UsageError("--abort never saves: give one of --no-save and --abort")
    asked = {"command": "abort"} if abort else {"command": "stop", "save": not no_save}
    _ask(asked, root, timeout_s, options, as_json=as_json)


@cli.group("drill", cls=Group)
def drill_group() -> None:
    """Rehearse what a cluster does to a job, with the job's own command.

    Examples:
      dcpsvc drill sigterm -- torchrun --nproc-per-node 2 train.py
    """


@drill_group.command("sigterm", context_settings={"allow_interspersed_args": False})
@click.option("--root", help="The job's run root. Default: the first one that the command opens on this host.")
@click.option("--after-step", "after_steps", type=click.IntRange(min=1), default=3, show_default=True, metavar="N")
@click.option("--signal", "name", type=click.Choice(["TERM", "USR1"]), default="TERM", show_default=True)
@click.option("--to", type=click.Choice(["rank", "launcher"]), default="rank", show_default=True, help="Who gets it.")
@click.option("--grace", "grace_s", type=SECONDS, default=30.0, show_default=True, metavar="S")
@click.option("--start", "start_s", type=SECONDS, default=600.0, show_default=True, metavar="S")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@store_options
@as_json_option
def drill_sigterm_command(
    name: str, command: tuple[str, ...], options: tuple[str, ...], as_json: bool, **choices: Any
) -> None:
    """Run COMMAND, and after N steps send one of its ranks SIGTERM, as a preemption does; then judge what is left.

    The job has S seconds (--grace) to save and to end, before it is killed; it must make its first steps within
    --start. Exits with 1 if work would be lost, or the job does not end.

    Examples:
      dcpsvc drill sigterm -- torchrun --nproc-per-node 2 train.py
    """
    from dcpsvc.tools import drill

    plan = drill.Drill(command=command, signum=drill.SIGNALS[name], storage_options=parse(options), **choices)
    try:
        verdict = drill.run(plan, sys.stderr.buffer if as_json else None, lambda line: click.echo(line, err=True))
    except OSError as err:
        raise click.UsageError(f"{command[0]}: {err.strerror or err}") from err
    if as_json:
        print_json(verdict.document())
    else:
        livetables.print_verdict(verdict)
    sys.exit(0 if verdict.passed else EXIT_DAMAGED)


@cli.command("demo")
@click.option("--root", help="Where the checkpoints go: a directory or URL. Default: inside --dir.")
@click.option("--parallel", type=click.Choice(["fsdp", "ddp", "none"]), default="fsdp", show_default=True)
@click.option("--ranks", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option("--steps", type=click.IntRange(min=3), default=60, show_default=True)
@click.option("--every", type=click.IntRange(min=1), default=20, show_default=True, help="Steps between two saves.")
@click.option("--dir", "directory", type=click.Path(file_okay=False), help="Where logs and the default root go.")
@click.option("--tamper", is_flag=True, hidden=True, help="Resume with another dropout: the comparison must notice.")
@store_options
@as_json_option
def demo_command(directory: str | None, tamper: bool, options: tuple[str, ...], **choices: Any) -> None:
    """Train a small GPT, SIGKILL a rank in the middle of a save, resume, and compare every loss bit by bit.

    Exits with 1 if a single step differs from the run that was never interrupted.

    Examples:
      dcpsvc demo --ranks 4
    """
    from pathlib import Path

    from dcpsvc.demo.run import run_demo

    keep_dir = Path(directory) if directory else None
    sys.exit(run_demo(keep_dir=keep_dir, storage_options=parse(options), break_resume=tamper, **choices))


def main() -> NoReturn:
    """Run the command line; errors of ours become one line, or one JSON object, and an exit code."""
    asked = Asked()
    try:
        cli.main(prog_name="dcpsvc", standalone_mode=False, obj=asked)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except failures.TOLD as err:
        failures.tell(err, as_json=asked.for_json)
        sys.exit(failures.exit_code(err))
    sys.exit(0)


def _ask(asked: dict[str, Any], root: str, timeout_s: float, options: tuple[str, ...], *, as_json: bool) -> None:
    began = time.monotonic()
    rank = live.speaker(root, parse(options))
    answer = live.command(rank, asked, timeout_s, lambda step: click.echo(f"all ranks act after step {step}", err=True))
    if as_json:
        print_json(answer)
    else:
        livetables.print_answer(answer, time.monotonic() - began)
