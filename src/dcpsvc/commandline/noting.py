"""Commands that note something beside a checkpoint: pin, unpin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dcpsvc import sidefiles
from dcpsvc.commandline.common import Command, as_json_option, open_store, print_json, store_options
from dcpsvc.commandline.steps import attempt_option, only, step_argument

if TYPE_CHECKING:
    from dcpsvc.commandline.steps import Step


@click.command("pin", cls=Command)
@click.argument("root")
@step_argument()
@click.option("--note", default="", metavar="TEXT", help="Why; shown by ls.")
@attempt_option
@store_options
@as_json_option
def pin_command(root: str, step: Step, note: str, attempt: str | None, options: tuple[str, ...], as_json: bool) -> None:
    """Have the checkpoint of STEP stay, whatever the policy of a live job says.

    Of several attempts one must be named.

    Examples:
      dcpsvc pin ./runs/exp42 500 --note "paper, table 3"
      dcpsvc pin ./runs/exp42 latest
    """
    store = open_store(root, options)
    found = only(store, step, attempt)
    sidefiles.pin(store, found, note)
    if as_json:
        print_json({"step": found.step, "attempt": found.attempt, "note": note})
    else:
        click.echo(f"step {found.step}, attempt {found.attempt}: pinned{f' ({note})' if note else ''}")


@click.command("unpin", cls=Command)
@click.argument("root")
@step_argument()
@attempt_option
@store_options
@as_json_option
def unpin_command(root: str, step: Step, attempt: str | None, options: tuple[str, ...], as_json: bool) -> None:
    """Leave the checkpoint of STEP to the policy again.

    Examples:
      dcpsvc unpin ./runs/exp42 500
    """
    store = open_store(root, options)
    found = only(store, step, attempt)
    removed = sidefiles.unpin(store, found)
    if as_json:
        print_json({"step": found.step, "attempt": found.attempt, "pins_removed": removed})
    else:
        said = f"{removed} {'pin' if removed == 1 else 'pins'} removed" if removed else "it was not pinned"
        click.echo(f"step {found.step}, attempt {found.attempt}: {said}")
