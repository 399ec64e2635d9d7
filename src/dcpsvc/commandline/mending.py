"""Commands that make a new checkpoint out of another: edit, promote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dcpsvc import progress
from dcpsvc.commandline.common import Command, as_json_option, open_store, parse, print_json, store_options
from dcpsvc.commandline.steps import attempt_option, pick, step_argument
from dcpsvc.storage import open as stores
from dcpsvc.tools import changes

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.commandline.steps import Step
    from dcpsvc.tools.surgery import Made, Operation

_set_option = click.option(
    "--set", "settings", multiple=True, metavar="PATH=VALUE", help="Set a plain value, as JSON (repeatable)."
)
_drop_option = click.option(
    "--drop", multiple=True, metavar="NAME", help="Leave a component out (repeatable); resume(skip=[NAME]) then."
)
_dry_option = click.option("--dry-run", is_flag=True, help="Only tell what would be changed.")
_take_over_option = click.option(
    "--take-over", is_flag=True, help="The last job ran on another host, and has ended: take its run over."
)


@click.command("edit", cls=Command)
@click.argument("root")
@step_argument()
@_set_option
@_drop_option
@attempt_option
@_dry_option
@_take_over_option
@store_options
@as_json_option
def edit_command(root: str, step: Step, attempt: str | None, options: tuple[str, ...], **choices: Any) -> None:
    """Commit a changed copy of the checkpoint of STEP, which counts instead of it; the old one stays.

    No job of the run may be alive. A path that names no param_groups means all of them; a scheduler keeps learning
    rates of its own (sched.base_lrs, sched._last_lr).

    Examples:
      dcpsvc edit ./runs/exp42 500 --set optim.lr=1e-4 --dry-run
      dcpsvc edit s3://bucket/runs/exp42 500 --set 'sched.base_lrs=[1e-4]' --drop loader
    """
    from dcpsvc.tools import surgery

    operation = _operation(root, step, attempt, options, choices)
    if not operation.settings and not operation.drop:
        raise click.UsageError("nothing to change: give --set or --drop")
    _run(operation, choices, lambda advance: surgery.edit(operation, advance, take_over=choices["take_over"]))


@click.command("promote", cls=Command)
@click.argument("root")
@step_argument()
@click.argument("new_root")
@_set_option
@_drop_option
@attempt_option
@_dry_option
@_take_over_option
@store_options
@as_json_option
def promote_command(
    root: str, step: Step, new_root: str, attempt: str | None, options: tuple[str, ...], **choices: Any
) -> None:
    """Commit a copy of the checkpoint of STEP in NEW_ROOT, another run, from which training goes on there.

    Examples:
      dcpsvc promote ./runs/exp42 500 ./runs/exp43
      dcpsvc promote ./runs/exp42 500 ./runs/exp43 --set optim.lr=1e-4 --drop sched
    """
    from dcpsvc.tools import surgery

    operation = _operation(root, step, attempt, options, choices)
    target = stores.open_store(new_root, parse(options))
    _run(
        operation, choices, lambda advance: surgery.promote(operation, target, advance, take_over=choices["take_over"])
    )


def _operation(
    root: str, step: Step, attempt: str | None, options: tuple[str, ...], choices: dict[str, Any]
) -> Operation:
    from dcpsvc.tools.surgery import Operation

    store = open_store(root, options)
    try:
        settings = tuple(changes.setting(text) for text in choices["settings"])
    except ValueError as err:
        raise click.BadParameter(str(err), param_hint="--set") from err
    manifest = pick(store, step, attempt)
    return Operation(source=store, manifest=manifest, settings=settings, drop=choices["drop"])


def _run(operation: Operation, choices: dict[str, Any], work: Callable[[Callable[[int], None]], Made]) -> None:
    from dcpsvc.tools import transplant

    plan = operation.plan()
    if choices["dry_run"]:
        if choices["as_json"]:
            print_json({"changes": list(plan.lines)})
        else:
            click.echo("\n".join(plan.lines) or "an unchanged copy")
        return
    with progress.shown("copied", transplant.copied_nbytes(plan.layout), quiet=choices["as_json"]) as advance:
        made = work(advance)
    if choices["as_json"]:
        about = {"step": made.manifest.step, "attempt": made.manifest.attempt, "run_id": made.manifest.run_id}
        print_json(about | {"changes": list(made.lineage.changes), "newer": list(made.newer)})
        return
    click.echo(f"step {made.manifest.step}, attempt {made.manifest.attempt}: {made.lineage}")
    if made.newer:
        click.echo(f"newer steps are committed: resume({made.manifest.step}) continues from this one")
