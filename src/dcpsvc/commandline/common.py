"""What the commands share: help, options, opening a run root, JSON."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from dcpsvc.config import Options
from dcpsvc.format import keys, run
from dcpsvc.reading import open_root
from dcpsvc.tools.verifying import AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from dcpsvc.storage.base import Store

EXIT_DAMAGED, EXIT_USAGE, EXIT_UNUSABLE, EXIT_NOT_LIVE = 1, 2, 3, 4

SECONDS = click.FloatRange(min=0, min_open=True)


def size_in_bytes(text: str) -> int:
    """``105GB``, ``1.5TiB``, ``4096`` in bytes."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is no size: write 105GB, 1.5TiB or a number of bytes")
    base, power = 1024 if match["binary"] else 1000, " KMGTP".index(match["prefix"].upper() or " ")
    return round(float(match["number"]) * float(base**power))


def time_in_seconds(text: str) -> float:
    """``24h``, ``90min``, ``30s``, ``7d`` in seconds."""
    match = _DURATION.fullmatch(text)
    if match is None or not float(match["number"]):
        raise click.BadParameter(f"{text!r} is no time: write 24h, 90min, 30s or 7d")
    return float(match["number"]) * {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400}[match["unit"]]


_EXIT_CODES = (
    "Exit codes: 0 well, 1 damaged, different, missing or not saved, 2 usage, 3 root unusable, 4 no live job of this "
    "run on this host."
)


class Command(click.Command):
    """Its help keeps the lines below ``Examples:`` as they are, and ends with the exit codes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """While the shell completes the value of an option click must not miss that value: it would parse nothing."""
        if ctx.resilient_parsing and args and any(args[-1] in one.opts for one in self.params if _takes_value(one)):
            args = args[:-1]
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Those of all commands: scripts rely on them."""
        super().format_epilog(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text(_EXIT_CODES)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Mark them the way that click wants it, which no docstring need know."""
        written = self.help
        self.help = written and inspect.cleandoc(written).replace("\n\nExamples:\n", "\n\n\b\nExamples:\n")
        try:
            super().format_help_text(ctx, formatter)
        finally:
            self.help = written


def _takes_value(parameter: click.Parameter) -> bool:
    return isinstance(parameter, click.Option) and not parameter.is_flag


class Group(Command, click.Group):
    """Lists its commands by what they are for.

    Args:
        sections: Names of commands below titles; None: one list.
    """

    command_class = Command

    def __init__(self, *args: Any, sections: Mapping[str, Sequence[str]] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.sections = sections

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A list for each section."""
        if self.sections is None:
            super().format_commands(ctx, formatter)
            return
        width = max(map(len, self.commands))
        for title, names in self.sections.items():
            with formatter.section(title):
                shown = [(f"{name:{width}}", self.commands[name].get_short_help_str(200)) for name in names]
                formatter.write_dl(shown)


_SIZE = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?) ?(?P<prefix>[kKMGTP]?)(?P<binary>i?)B?")
_DURATION = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?) ?(?P<unit>s|min|h|d|)")


@dataclass(slots=True)
class Asked:
    """What holds for a call of the program whatever command it comes to.

    Attributes:
        for_json: ``--json`` was given: an error is told in JSON, too.
    """

    for_json: bool = False


def _asked_for_json(context: click.Context, _: click.Parameter, value: bool) -> bool:
    context.ensure_object(Asked).for_json = value
    return value


as_json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,  # before all that may be wrong with the others
    callback=_asked_for_json,
    help="Print one JSON document instead of a table; an error, too.",
)
store_options = click.option(
    "-o",
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Passed to fsspec, e.g. -o endpoint_url=http://127.0.0.1:9000 (repeatable).",
)
local_option = click.option(
    "--local",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="This node's tier, as given to the Checkpointer. Default: $DCPSVC_LOCAL, else where jobs keep it.",
)


jobs_option = click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    default=AT_ONCE,
    show_default=True,
    metavar="N",
    help="Shards read side by side.",
)


def open_store(root: str, options: tuple[str, ...]) -> Store:
    """The run root, which must exist."""
    return open_root(root, parse(options))


def local_path(store: Store, local: str | None) -> Path:
    """Where this node keeps its part of that run, whether or not it does."""
    found = run.loads(store.url, store.get(keys.RUN, max_nbytes=run.MAX_NBYTES))
    return Options(local=local).local_dir / found.run_id


def parse(options: tuple[str, ...]) -> dict[str, Any]:
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


def print_json(document: Any) -> None:
    """One document on standard output; NaN and infinities as strings, which is all that JSON allows."""
    click.echo(json.dumps(_finite(document), indent=1, allow_nan=False))


def json_line(document: Any) -> str:
    """The same in one line, for where more is printed."""
    return json.dumps(_finite(document), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
