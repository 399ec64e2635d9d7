"""Which checkpoint a command means: a step or ``latest``, and one attempt of it; the shell completes both."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dcpsvc import marking
from dcpsvc.commandline.common import open_store
from dcpsvc.errors import DcpsvcError, NoValidCheckpointError
from dcpsvc.stages import discover
from dcpsvc.tools import showing

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.storage.base import Store

F = TypeVar("F", bound="Callable[..., Any]")

LATEST = "latest"

Step = int | str
"""A step as it was typed: a number, or ``latest``."""


def step_typed(text: str) -> Step:
    """A number, or ``latest``."""
    if text != LATEST and not text.isdecimal():
        raise click.BadParameter(f"{text!r} is neither a number nor {LATEST!r}")
    return LATEST if text == LATEST else int(text)


def number(store: Store, step: Step) -> int:
    """The step that was meant.

    Raises:
        NoValidCheckpointError: The latest was, and nothing is committed.
    """
    if isinstance(step, int):
        return step
    found = discover.committed(store)
    if not found:
        raise NoValidCheckpointError(store.url, ("nothing is committed",))
    return found[-1].step


def pick(store: Store, step: Step, attempt: str | None = None, option: str = "--attempt") -> Manifest:
    """The checkpoint that was meant; of several attempts the newest, which is said, with the option that names one.

    Args:
        store: The run root.
        step: As it was typed.
        attempt: Of that step.
        option: With which the command takes it; empty if it does not.

    Raises:
        NoSuchStepError: There is none, or it is damaged.
    """
    found = showing.find(store, number(store, step), attempt)
    others = attempts(store, found.step)
    if attempt is None and len(others) > 1:
        named = f" ({option})" if option else ""
        click.echo(f"step {found.step} has {len(others)} attempts; taking {found.attempt}{named}", err=True)
    return found


def attempts(store: Store, step: int) -> list[Attempt]:
    """The commits of a step."""
    return [one for one in discover.committed(store) if one.step == step]


def only(store: Store, step: Step, attempt: str | None) -> Attempt:
    """The one commit that was meant, for what is not to hit another one.

    Raises:
        NoSuchStepError: There is none.
        click.UsageError: There are several.
    """
    found = marking.find(store, number(store, step), attempt)
    check_one(store, found.step, attempt)
    return found


def check_one(store: Store, step: int, attempt: str | None) -> None:
    """Refuse to choose between the attempts of a step."""
    there = [one.attempt for one in attempts(store, step)]
    if attempt is None and len(there) > 1:
        raise click.UsageError(f"step {step} has {len(there)} attempts, {', '.join(there)}: name one with --attempt")


def complete_step(context: click.Context, _: click.Parameter, typed: str) -> list[str]:
    """Steps of ROOT that begin with what was typed; none if it cannot be asked."""
    with contextlib.suppress(DcpsvcError, click.ClickException):
        store = open_store(str(context.params.get("root")), tuple(context.params.get("options") or ()))
        steps = dict.fromkeys([*(str(one.step) for one in reversed(discover.committed(store))), LATEST])
        return [step for step in steps if step.startswith(typed)]
    return []


def complete_attempt(context: click.Context, _: click.Parameter, typed: str) -> list[str]:
    """Attempts of the step, or of any, that begin with what was typed; none if ROOT cannot be asked."""
    with contextlib.suppress(DcpsvcError, click.ClickException):
        store = open_store(str(context.params.get("root")), tuple(context.params.get("options") or ()))
        step = context.params.get("step")
        found = [one.attempt for one in reversed(discover.committed(store)) if step in {None, LATEST, one.step}]
        return [attempt for attempt in found if attempt.startswith(typed)]
    return []


attempt_option = click.option(
    "--attempt", shell_complete=complete_attempt, help="Which attempt, where a step has several commits."
)


def step_argument(*, required: bool = True, name: str = "step", nargs: int = 1) -> Callable[[F], F]:
    """A step of ROOT, or several; the shell completes it."""
    return click.argument(name, type=step_typed, required=required, nargs=nargs, shell_complete=complete_step)
