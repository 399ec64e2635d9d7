"""``dcpsvc doctor``: in this process, as a rank of a launcher, or through a launcher that it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import click

from dcpsvc.commandline.common import (
    EXIT_DAMAGED,
    SECONDS,
    Command,
    as_json_option,
    local_option,
    parse,
    print_json,
    size_in_bytes,
    store_options,
    time_in_seconds,
)
from dcpsvc.config import Options

_MARK = "dcpsvc-doctor: "


class LauncherError(click.ClickException):
    """What was to start the ranks ended before they gave a verdict."""


class _WithLauncher(Command):
    """Takes what follows ``--`` for itself: ROOT may be left out before it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["launcher"] = ()
        if len(args) == 1 and args[0].startswith("["):  # from _through()
            args = json.loads(args[0])
        if "--" in args:
            at = args.index("--")
            ctx.meta["launcher"], args = tuple(args[at + 1 :]), args[:at]
        ctx.meta["arguments"] = tuple(args)
        return super().parse_args(ctx, args)


@click.command("doctor", cls=_WithLauncher, options_metavar="[OPTIONS]", epilog="After --: what starts the ranks.")
@click.argument("root", required=False)
@local_option
@click.option(
    "--size", type=size_in_bytes, default="64MiB", show_default=True, metavar="SIZE", help="What each rank saves."
)
@click.option(
    "--model",
    type=size_in_bytes,
    metavar="SIZE",
    help="Size of the checkpoints to come, of which it predicts the cost. Default: that of ROOT's newest.",
)
@click.option("--ranks", type=click.IntRange(min=1), metavar="N", help="How many will share it, if more than now.")
@click.option(
    "--mtbf", type=time_in_seconds, default="24h", show_default=True, metavar="TIME", help="Between two failures."
)
@click.option(
    "--grace", type=time_in_seconds, default="25s", show_default=True, metavar="TIME", help="SIGTERM to SIGKILL."
)
@click.option("--timeout", "timeout_s", type=SECONDS, default=60.0, show_default=True, metavar="S", help="For a peer.")
@click.option(
    "--as-rank", is_flag=True, hidden=True, help="Print the verdict for the doctor that started the launcher."
)
@store_options
@as_json_option
@click.pass_context
def doctor_command(context: click.Context, /, as_rank: bool, as_json: bool, **choices: Any) -> None:
    """Examine this machine, these ranks and the run root, with a real small checkpoint that is removed again.

    Exits with 1 if jobs would not work. Without ROOT only the machine is examined. Run it where the job will run;
    under a launcher, or with one after --, every rank takes part.

    Examples:
      dcpsvc doctor s3://bucket/runs/exp42 --local /nvme/ckpt
      dcpsvc doctor ./runs/exp42 --model 105GB --mtbf 12h -- torchrun --nproc-per-node 8
      srun torchrun --nnodes 4 --nproc-per-node 8 ... -m dcpsvc doctor s3://bucket/runs/exp42
    """
    if launcher := context.meta["launcher"]:
        said = _through(launcher, context.meta["arguments"])
        is_speaker = True
    else:
        said, is_speaker = _here(**choices, quiet=as_json)
    if as_rank:
        if is_speaker:
            click.echo(_MARK + json.dumps(said))
        return
    if is_speaker:
        _show(said, as_json=as_json)
    sys.exit(0 if said["passed"] else EXIT_DAMAGED)


def _here(
    *,
    root: str | None,
    local: str | None,
    size: int,
    model: int | None,
    ranks: int | None,
    mtbf: float,
    grace: float,
    timeout_s: float,
    options: tuple[str, ...],
    quiet: bool,
) -> tuple[dict[str, Any], bool]:
    from dcpsvc.doctor.apart import examine
    from dcpsvc.doctor.examination import Plan

    plan = Plan(
        root=root, local=Options(local=local).local_dir, options=parse(options), nbytes=size, model_nbytes=model,
        ranks=ranks, mtbf_s=mtbf, grace_s=grace, timeout_s=timeout_s, quiet=quiet,
    )  # fmt: skip
    found, is_speaker = examine(plan)
    return found.to_json(), is_speaker


def _through(launcher: tuple[str, ...], arguments: tuple[str, ...]) -> dict[str, Any]:
    """Have the launcher start the ranks; the first one's verdict comes back on its standard output."""
    packed = json.dumps([*arguments, "--as-rank"])  # as one word: torchrun takes --local for an option of its own
    command = [*launcher, "-m", "dcpsvc", "doctor", packed]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:  # noqa: S603 - the user's command
            assert started.stdout is not None  # noqa: S101 - asked for
            said = None
            for line in started.stdout:
                _, mark, verdict = line.partition(_MARK)
                if mark:
                    said = json.loads(verdict)
                else:
                    click.echo(line, err=True, nl=False)
    except OSError as err:
        raise click.UsageError(f"{launcher[0]}: {err.strerror or err}") from err
    if said is None:
        raise LauncherError(
            f"{launcher[0]} ended with {started.returncode} before its ranks gave a verdict; what it said is above"
        )
    return dict(said)


def _show(said: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(said)
        return
    from dcpsvc.doctor.examination import Examination
    from dcpsvc.doctor.table import print_examination

    print_examination(Examination.from_json(said))
