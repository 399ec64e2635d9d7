"""Every command of the program, as it lists them itself: what holds for all is tried with all."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TYPE_CHECKING, NamedTuple

import click
import pytest

from dcpsvc.cli import cli, main

if TYPE_CHECKING:
    from collections.abc import Iterator


def commands(group: click.Group = cli, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Each command with the words that call it, groups and what is in them."""
    for name, command in group.commands.items():
        yield (*before, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*before, name))


def with_json() -> dict[str, click.Command]:
    """Those that print a document if asked to, by the words that call them."""
    return {" ".join(words): one for words, one in commands() if any("--json" in each.opts for each in one.params)}


class Said(NamedTuple):
    """How a call of the program went."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> Said:
    """The program in this process, which is faster than one of its own, to its end."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dcpsvc", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return Said(ended.value.code, *(one.buffer.getvalue().decode() for one in (out, err)))
