"""The command ``dcpsvc export``: thin over :mod:`dcpsvc.tools.exporting` and :mod:`dcpsvc.conversion`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dcpsvc import progress
from dcpsvc.commandline.common import Command, open_store, store_options
from dcpsvc.errors import NoSuchStepError
from dcpsvc.stages import discover

if TYPE_CHECKING:
    from dcpsvc.storage.base import Store

_MIB = 1 << 20
_FLOATS = ("F64", "F32", "F16", "BF16")


@click.command("export", cls=Command)
@click.argument("root")
@click.argument("step")
@click.argument("directory", type=click.Path(file_okay=False))
@click.option("--format", "kind", type=click.Choice(["hf", "peft", "dcp", "torch"]), required=True)
@click.option(
    "--component",
    help="The module, or a dotted beginning below it; else model; of dcp: only its tensors, as it calls them.",
)
@click.option("--dtype", type=click.Choice(_FLOATS), help="Cast floating-point tensors.")
@click.option(
    "--max-shard-mib", type=click.IntRange(min=1), default=5120, show_default=True, help="Largest file of hf, in MiB."
)
@store_options
def export_command(
    root: str,
    step: str,
    directory: str,
    kind: str,
    component: str | None,
    dtype: str | None,
    max_shard_mib: int,
    options: tuple[str, ...],
) -> None:
    """Write the checkpoint of STEP, a number or "latest", into DIRECTORY as other tools read it.

    hf: safetensors with index for from_pretrained. peft: adapters. dcp: a stock DCP directory. torch: model.pt.
    Every byte is verified. An export that was cut short goes on where it was.

    Examples:
      dcpsvc export s3://bucket/runs/exp42 latest ./model --format hf --dtype BF16
    """
    from dcpsvc.tools import exporting, showing  # takes NumPy, which the other commands do without

    store = open_store(root, options)
    number = _step(store, step)
    if kind == "dcp":
        from dcpsvc import conversion

        total = sum(tensor.nbytes for tensor in showing.show(store, number).layout.tensors.values())
        with progress.shown("exported", total) as advance:
            conversion.export_dcp(store, number, directory, component=component or "", dtype=dtype, progress=advance)
        return
    source = exporting.Source(store, number, component or "model")
    with progress.shown("exported", exporting.planned_nbytes(source)) as advance:
        if kind == "hf":
            exporting.export_hf(source, directory, dtype=dtype, max_shard_nbytes=max_shard_mib * _MIB, progress=advance)
        elif kind == "peft":
            exporting.export_peft(source, directory, dtype=dtype, progress=advance)
        else:
            from dcpsvc import conversion

            conversion.export_torch(source, store, directory, dtype=dtype, progress=advance)


def _step(store: Store, text: str) -> int:
    found = sorted({attempt.step for attempt in discover.committed(store)})
    if text == "latest" and found:
        return found[-1]
    if not text.isdecimal():
        if text == "latest":
            raise NoSuchStepError(store.url, 0, (), "nothing is committed")
        raise click.BadParameter(f"{text!r} is neither a number nor 'latest'", param_hint="STEP")
    return int(text)
