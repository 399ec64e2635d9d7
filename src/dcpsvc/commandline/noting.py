"""Commands that note something beside a checkpoint: pin, unpin."""

from __future__ import annotations

import click

from dcpsvc import marking
from dcpsvc.commandline.common import Command, parse, step_argument, store_options

_attempt_option = click.option("--attempt", help="Which attempt, where a step has several commits.")


@click.command("pin", cls=Command)
@click.argument("root")
@step_argument()
@click.option("--note", default="", metavar="TEXT", help="Why; shown by ls.")
@_attempt_option
@store_options
def pin_command(root: str, step: int, note: str, attempt: str | None, options: tuple[str, ...]) -> None:
    """Have the checkpoint of STEP stay, whatever the policy of a live job says.

    Examples:
      dcpsvc pin ./runs/exp42 500 --note "paper, table 3"
    """
    marking.pin(root, step, note, attempt=attempt, storage_options=parse(options))


@click.command("unpin", cls=Command)
@click.argument("root")
@step_argument()
@_attempt_option
@store_options
def unpin_command(root: str, step: int, attempt: str | None, options: tuple[str, ...]) -> None:
    """Leave the checkpoint of STEP to the policy again.

    Examples:
      dcpsvc unpin ./runs/exp42 500
    """
    marking.unpin(root, step, attempt=attempt, storage_options=parse(options))
