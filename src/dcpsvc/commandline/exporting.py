"""The command ``dcpsvc export``: thin over :mod:`dcpsvc.tools.exporting` and :mod:`dcpsvc.conversion`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dcpsvc import progress
from dcpsvc.commandline.common import Command, as_json_option, open_store, print_json, store_options
from dcpsvc.commandline.steps import attempt_option, pick, step_argument
from dcpsvc.storage.oserror import from_os_error

_MIB = 1 << 20
_FLOATS = ("F64", "F32", "F16", "BF16")


if TYPE_CHECKING:
    from dcpsvc.commandline.steps import Step
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.storage.base import Store


@click.command("export", cls=Command)
@click.argument("root")
@step_argument()
@click.argument("directory", type=click.Path(file_okay=False))
@click.option("--format", "kind", type=click.Choice(["hf", "peft", "dcp", "torch"]), required=True)
@attempt_option
@click.option(
    "--component",
    help="The module, or a dotted beginning below it; else model; of dcp: only its tensors, as it calls them.",
)
@click.option(
    "--flat",
    is_flag=True,
    help="Of dcp, as torchtitan lays it out: the module's tensors as it calls them, and all else beside them.",
)
@click.option("--dtype", type=click.Choice(_FLOATS), help="Cast floating-point tensors.")
@click.option(
    "--max-shard-mib", type=click.IntRange(min=1), default=5120, show_default=True, help="Largest file of hf, in MiB."
)
@store_options
@as_json_option
def export_command(
    root: str,
    step: Step,
    directory: str,
    attempt: str | None,
    kind: str,
    component: str | None,
    flat: bool,
    dtype: str | None,
    max_shard_mib: int,
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write the checkpoint of STEP into DIRECTORY, as other tools read it.

    hf: safetensors with index for from_pretrained. peft: adapters. dcp: a stock DCP directory. torch: model.pt.
    Every byte is verified. An export that was cut short goes on where it was.

    Examples:
      dcpsvc export s3://bucket/runs/exp42 latest ./model --format hf --dtype BF16
    """
    if flat and kind != "dcp":
        raise click.UsageError("--flat is of --format dcp")
    store = open_store(root, options)
    found = pick(store, step, attempt)
    try:
        nbytes = _export(store, found, Path(directory), kind, component, dtype, max_shard_mib, flat=flat, quiet=as_json)
    except OSError as err:
        raise from_os_error("export", directory, err) from err
    if as_json:
        about = {"step": found.step, "attempt": found.attempt, "format": kind, "directory": directory}
        print_json(about | {"nbytes": nbytes})
    else:
        click.echo(f"step {found.step}, attempt {found.attempt}: {progress.size(nbytes)} in {directory}, as {kind}")


def _export(
    store: Store,
    found: Manifest,
    directory: Path,
    kind: str,
    component: str | None,
    dtype: str | None,
    max_mib: int,
    *,
    flat: bool,
    quiet: bool,
) -> int:
    """Says how many bytes lie in the directory then."""
    from dcpsvc.tools import exporting, showing  # takes NumPy, which the other commands do without

    if kind == "dcp":
        from dcpsvc import conversion

        total = conversion.planned_nbytes(showing.layout_of(store, found), "" if flat else component or "")
        with progress.shown("exported", total, quiet=quiet) as advance:
            conversion.export_dcp(
                store, found.step, directory, attempt=found.attempt, component=component or "", flat=flat, dtype=dtype,
                progress=advance,
            )  # fmt: skip
    else:
        source = exporting.Source(store, found.step, component or "model", found.attempt)
        total = exporting.planned_nbytes(source, adapters=kind == "peft")
        with progress.shown("exported", total, quiet=quiet) as advance:
            if kind == "hf":
                exporting.export_hf(source, directory, dtype=dtype, max_shard_nbytes=max_mib * _MIB, progress=advance)
            elif kind == "peft":
                exporting.export_peft(source, directory, dtype=dtype, progress=advance)
            else:
                from dcpsvc import conversion

                conversion.export_torch(source, store, directory, dtype=dtype, progress=advance)
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
