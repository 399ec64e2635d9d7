"""Commands that copy checkpoints to another place: fetch, cp."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dcpsvc import deletions, progress
from dcpsvc.commandline.common import (
    Command,
    as_json_option,
    jobs_option,
    open_store,
    parse,
    print_json,
    store_options,
)
from dcpsvc.commandline.steps import attempt_option, number, pick, step_argument
from dcpsvc.errors import DestinationError, NoValidCheckpointError
from dcpsvc.format.keys import Attempt
from dcpsvc.storage import open as stores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dcpsvc.commandline.steps import Step
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.storage.base import Store
    from dcpsvc.tools.mirroring import Copied

_take_over_option = click.option("--take-over", is_flag=True, help="A job has trained there, and has ended: add to it.")


@click.command("fetch", cls=Command)
@click.argument("root")
@step_argument()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@attempt_option
@_take_over_option
@jobs_option
@store_options
@as_json_option
def fetch_command(
    root: str, step: Step, directory: Path, attempt: str | None, options: tuple[str, ...], as_json: bool, **choices: Any
) -> None:
    """Copy the checkpoint of STEP into DIRECTORY, every byte proven; DIRECTORY is a run root then.

    Begun again, it goes on where it broke off. Metrics and pins come along.

    Examples:
      dcpsvc fetch s3://bucket/runs/exp42 500 ./exp42
      python -c "import dcpsvc; dcpsvc.load('./exp42', {'model': model})"
    """
    store = open_store(root, options)
    manifest = pick(store, step, attempt)
    (found,) = _copy(store, [manifest], stores.open_store(str(directory)), choices, quiet=as_json)
    if found.gone:
        raise deletions.error(store, manifest.key)
    if as_json:
        print_json(asdict(found) | {"directory": str(directory)})
    else:
        click.echo(_told(found, str(directory)))


@click.command("cp", cls=Command)
@click.argument("root")
@click.argument("root2")
@step_argument(name="steps", required=False, nargs=-1)
@_take_over_option
@click.option(
    "--to-option", "to_options", multiple=True, metavar="KEY=VALUE", help="As -o, for ROOT2 (default: as -o)."
)
@jobs_option
@store_options
@as_json_option
def cp_command(
    root: str, root2: str, steps: tuple[Step, ...], options: tuple[str, ...], as_json: bool, **choices: Any
) -> None:
    """Copy checkpoints of the run at ROOT to ROOT2, another place for the same run: those of STEPS, or all.

    Every byte is proven; metrics and pins come along, each manifest comes last, and what is there is left as it is: run
    it again to go on, or to keep a mirror up to date. Nothing is deleted. Training can go on at ROOT2.

    Examples:
      dcpsvc cp s3://bucket/runs/exp42 s3://archive/runs/exp42
      dcpsvc cp /scratch/exp42 s3://bucket/runs/exp42 500 1000 -o endpoint_url=http://127.0.0.1:9000
    """
    source = open_store(root, options if "://" in root else ())  # a directory takes none
    target = stores.open_store(root2, parse(choices["to_options"] or (options if "://" in root2 else ())))
    if source.url == target.url:
        raise DestinationError(target.url, "is the same place")
    manifests = _wanted(source, steps)
    done = _copy(source, manifests, target, choices, quiet=as_json)
    if as_json:
        print_json([asdict(one) for one in done])
    else:
        _tell(done, target.url)
    for one in done:
        if steps and one.gone:  # it was named; of all that there is, some may go
            raise deletions.error(source, Attempt(one.step, one.attempt))


def _tell(done: Sequence[Copied], where: str) -> None:
    for one in done:
        click.echo(_told(one, where))
    there = [one for one in done if not one.gone]
    count = "1 checkpoint" if len(there) == 1 else f"{len(there)} checkpoints"
    click.echo(f"{count}, {progress.size(sum(one.nbytes for one in there))}")


def _wanted(source: Store, steps: Sequence[Step]) -> list[Manifest]:
    """The commits that are whole; those of steps that were named must be."""
    from dcpsvc.stages import discover
    from dcpsvc.storage.threads import at_once

    if steps:
        return [pick(source, step, option="") for step in sorted({number(source, step) for step in steps})]
    seen = discover.look(source, at_once=at_once(source))
    whole = [one.manifest for one in seen if one.counts and one.manifest is not None]
    if not whole:
        raise NoValidCheckpointError(source.url, ("nothing is committed",))
    return whole


def _copy(
    source: Store, manifests: Sequence[Manifest], target: Store, choices: dict[str, Any], *, quiet: bool
) -> list[Copied]:
    from dcpsvc.tools import mirroring

    nbytes = sum(record.body_nbytes for manifest in manifests for record in manifest.shards)
    with progress.shown("copied", nbytes, quiet=quiet) as advance:
        return mirroring.copy(
            source, manifests, target, advance, at_once=choices["jobs"], take_over=choices["take_over"]
        )


def _told(one: Copied, where: str) -> str:
    if one.gone:
        return f"step {one.step} (attempt {one.attempt}): deleted meanwhile, not copied"
    there = f", of which {progress.size(one.found_nbytes)} lay there" if one.found_nbytes else ""
    return f"step {one.step} (attempt {one.attempt}): {progress.size(one.nbytes)} in {where}{there}"
