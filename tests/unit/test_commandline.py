"""What is the same for all commands: help that can be copied from, and JSON."""

from __future__ import annotations

import contextlib
import inspect
import os
import pty
import re
import subprocess
import sys
import termios
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

import dcpsvc
from dcpsvc.cli import cli
from dcpsvc.policies import Latest

if TYPE_CHECKING:
    from collections.abc import Iterator


def commands(group: click.Group = cli, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Each command with the words that call it, groups and what is in them."""
    for name, command in group.commands.items():
        yield (*before, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*before, name))


def told(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.stdout


@pytest.mark.parametrize(
    ("words", "command"), list(commands()), ids=lambda one: " ".join(one) if type(one) is tuple else ""
)
def test_each_example_in_the_help_is_a_line_that_can_be_copied(words, command):
    text = told(*words, "--help")
    assert "\\b" not in text
    _, title, written = inspect.cleandoc(command.help).partition("\n\nExamples:\n")
    assert title
    examples = [f"  {line}" for line in written.splitlines()]
    assert "\n".join(["\n  Examples:", *examples, ""]) in text
    assert any(f"dcpsvc {' '.join(words)}" in line for line in examples)


def test_the_help_lists_every_command_once_below_what_it_is_for():
    lines = told("--help").splitlines()
    first = next(number for number, line in enumerate(lines) if line == "Look:")
    listed = [line.split()[0] for line in lines[first:] if line.startswith("  ") and line[2] != " "]
    assert sorted(name for name in listed if name in cli.commands) == sorted(cli.commands)
    assert {"Look:", "Change:", "Live job:", "Move:"} <= set(lines)
    assert "..." not in "".join(lines[first:])


def on_a_terminal(columns: int, *arguments: object) -> list[str]:
    """What a command prints on a terminal of so many columns, by line."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    command = [sys.executable, "-m", "dcpsvc", *map(str, arguments)]
    environ = os.environ | {"NO_COLOR": "1"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as it:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while more := os.read(ours, 65536):
                said += more
        os.close(ours)
        assert it.wait(60) == 0, said.decode()
    return re.sub(r"\x1b\[[0-9;]*m", "", said.decode()).splitlines()


@pytest.mark.parametrize("columns", [80, 160])
def test_ls_shows_reasons_and_metrics_whole_on_a_terminal_of(columns, tmp_path):
    with dcpsvc.Checkpointer(tmp_path / "root", {"x": 1}, local=tmp_path / "local", keep=Latest(9)) as ckpt:
        for step in (10, 20):
            ckpt.save(step, metrics={"loss": 0.25, "eval": 0.5}).wait(30)
    lines = on_a_terminal(columns, "ls", tmp_path / "root")
    assert all(len(line) <= columns for line in lines)
    shown = " ".join(" ".join(lines).split())
    for text in ("kept because", "metrics / reason", "latest 1 of 9", "loss=0.25 eval=0.5", "committed"):
        assert text in shown
    assert ("ranks" in shown) == (columns == 160)
