"""The command ``dcpsvc import``: thin over :mod:`dcpsvc.tools.importing` and :mod:`dcpsvc.adoption`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dcpsvc import progress
from dcpsvc.commandline.common import Command, as_json_option, parse, print_json, store_options
from dcpsvc.storage import open as stores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dcpsvc.tools.foreign import Found
    from dcpsvc.tools.foreignoptimizer import Optimizer

_MIB = 1 << 20
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 5


@click.command("import", cls=Command)
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("root")
@click.argument("step", type=click.IntRange(min=0), default=0)
@click.option(
    "--format", "kind", type=click.Choice(["auto", "hf", "peft", "dcp", "torch"]), default="auto", show_default=True
)
@click.option("--component", default="model", show_default=True, help="What the module is called in the state.")
@click.option("--prefix", default="", help="Take only what lies below this dotted beginning, without it.")
@click.option("--rename", multiple=True, metavar="OLD=NEW", help="A dotted beginning is called otherwise (repeatable).")
@click.option(
    "--optimizer", default="", metavar="PREFIX[=NAME]",
    help="Take the optimizer below PREFIX, too, as get_state_dict() of torch names it; NAME: what the state calls it.",
)  # fmt: skip
@click.option("--dtype", type=click.Choice(_FLOATS), help="Cast floating-point tensors.")
@click.option(
    "--max-shard-mib", type=click.IntRange(min=1), default=4096, show_default=True,
    help="Largest shard, in MiB; each goes through a temporary file.",
)  # fmt: skip
@click.option("--take-over", is_flag=True, help="The last job ran on another host, and has ended: take its run over.")
@store_options
@as_json_option
def import_command(source: Path, root: str, options: tuple[str, ...], **choices: Any) -> None:
    """Commit the tensors of SOURCE as the checkpoint of STEP (0 if not given) of the run at ROOT.

    SOURCE: a folder of safetensors (hf) or of PEFT, a directory of torch.distributed.checkpoint (dcp), or a file of
    torch.save (torch). Nothing in it is executed. An import that was cut short goes on where it was.

    Examples:
      dcpsvc import ./Llama-3-8B s3://bucket/runs/exp42
      dcpsvc import ./old.pt ./runs/exp42 1000 --prefix state_dict --rename module=
    """
    from dcpsvc.tools.importing import Import

    everything, renames = _found(source, choices["kind"]), _renames(choices["rename"])
    found = everything.chosen(choices["prefix"], renames, but=choices["optimizer"].partition("=")[0])
    work = Import(
        found=found,
        target=stores.open_store(root, parse(options)),
        step=choices["step"],
        component=choices["component"],
        dtype=choices["dtype"],
        max_shard_nbytes=choices["max_shard_mib"] * _MIB,
        optimizer=_optimizer(everything, found, choices["optimizer"], renames),
    )
    with progress.shown("imported", work.nbytes, quiet=choices["as_json"]) as advance:
        manifest = work.commit(advance, take_over=choices["take_over"])
    count = len({tensor.name for tensor in found.tensors})
    if choices["as_json"]:
        about = {"step": manifest.step, "attempt": manifest.attempt, "run_id": manifest.run_id}
        print_json(about | {"tensors": count, "nbytes": work.nbytes, "left": list(found.left)})
        return
    click.echo(
        f"step {manifest.step}, attempt {manifest.attempt}: {count} tensors, {progress.size(work.nbytes)}, "
        f"as {choices['component']!r}, from {found.kind} {source}"
    )
    _tell_left(found.left)


def _tell_left(names: Sequence[str]) -> None:
    if names:
        more = ", ..." if len(names) > _SHOWN else ""
        click.echo(f"not taken: {', '.join(names[:_SHOWN])}{more} ({len(names)} in all)")


def _found(source: Path, kind: str) -> Found:
    from dcpsvc.tools import foreign

    kind = foreign.kind_of(source) if kind == "auto" else kind
    if kind == "hf":
        return foreign.find_hf(source)
    if kind == "peft":
        return foreign.find_peft(source)
    from dcpsvc import adoption

    return adoption.find_dcp(source) if kind == "dcp" else adoption.find_torch(source)


def _optimizer(everything: Found, model: Found, option: str, renames: dict[str, str]) -> Optimizer | None:
    if not option:
        return None
    from dcpsvc.tools import foreignoptimizer
    from dcpsvc.tools.foreign import renamed

    prefix, _, name = option.partition("=")
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    return foreignoptimizer.taken(everything, prefix, name or prefix, lambda each: renamed(each, renames), shapes)


def _renames(texts: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (_, equals, _) in zip(texts, pairs, strict=True) if not equals]:
        raise click.BadParameter(f"{wrong[0]!r} is not OLD=NEW", param_hint="--rename")
    return {old: new for old, _, new in pairs}
