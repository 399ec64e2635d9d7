"""What the program says, and ends with, when a command has failed: a line and what to do, or with --json an object."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

import click

from dcpsvc.commandline.common import EXIT_DAMAGED, EXIT_NOT_LIVE, EXIT_UNUSABLE, EXIT_USAGE, json_line
from dcpsvc.errors import (
    ConfigError,
    DcpsvcError,
    DestinationError,
    NoRunError,
    NoSuchStepError,
    RootError,
    RunBusyError,
    StepDeletedError,
    StoreError,
)
from dcpsvc.tools import live, remedies

TOLD = (DcpsvcError, live.LiveError, click.ClickException, OSError)
"""Errors that a user can do something about; others are bugs, and show where. An OSError: of standard output."""

_EXITS: dict[type[Exception], int] = {
    ConfigError: EXIT_USAGE,
    RootError: EXIT_UNUSABLE,
    StoreError: EXIT_UNUSABLE,
    live.NoLiveJobError: EXIT_NOT_LIVE,
}
_REMEDIES: dict[type[Exception], str] = {  # the first that fits
    StepDeletedError: "dcpsvc ls ROOT shows what is there; dcpsvc pin ROOT STEP has a checkpoint stay.",
    NoSuchStepError: "dcpsvc ls ROOT shows what is there.",
    RunBusyError: "One owner at a time: end the other job, or wait for it.",
    DestinationError: "Give another place, or another step.",
    NoRunError: "A run root holds run.json; the path is what the training script gave to Checkpointer(...).",
    live.NoAnswerError: "dcpsvc status ROOT shows how far the job is, dcpsvc ls ROOT what is committed.",
    live.NoLiveJobError: "Ask on a host of the job, as the job's user.",
}
_MORE = ("intact", "transient")
"""What classes say of their errors, beside the facts that each of them was given."""


def tell(err: Exception, *, as_json: bool) -> None:
    """Print one of :data:`TOLD` on standard error; as JSON it is one line, the last one."""
    if as_json:
        click.echo(json_line(document(err)), err=True)
    elif isinstance(err, click.ClickException):
        err.show()
    else:
        click.echo(f"dcpsvc: {_message(err)}", err=True)
        if advice := remedy(err):
            click.echo(f"        {advice}", err=True)


def exit_code(err: Exception) -> int:
    """What the program ends with after one of :data:`TOLD`."""
    if isinstance(err, click.ClickException):
        return err.exit_code
    return next((code for kind, code in _EXITS.items() if isinstance(err, kind)), EXIT_DAMAGED)


def document(err: Exception) -> dict[str, Any]:
    """The same as JSON-like values, the facts that an error of ours carries under their own names."""
    facts: dict[str, Any] = {}
    if not isinstance(err, click.ClickException):
        facts = vars(err) | {name: getattr(err, name) for name in _MORE if hasattr(err, name)}
    return {
        "error": type(err).__name__,
        "message": _message(err),
        **{name: _plain(fact) for name, fact in facts.items()},
        "remedy": remedy(err) or None,
        "exit_code": exit_code(err),
    }


def remedy(err: Exception) -> str:
    """What somebody can do about it; empty where the message says all there is."""
    if isinstance(err, StoreError):
        text = remedies.remedy(err)
        return text and f"{text[0].upper()}{text[1:]}."
    if isinstance(err, StepDeletedError) and not err.was_committed:  # a pin would not have helped, perhaps
        return "dcpsvc ls ROOT shows what is there."
    return next((text for kind, text in _REMEDIES.items() if isinstance(err, kind)), "")


def _message(err: Exception) -> str:
    if isinstance(err, OSError):
        return f"{err.filename or 'standard output'}: {err.strerror or err}"
    return err.format_message() if isinstance(err, click.ClickException) else str(err)


def _plain(fact: Any) -> Any:
    if isinstance(fact, list | tuple):
        return [_plain(each) for each in fact]
    return asdict(fact) if is_dataclass(fact) and not isinstance(fact, type) else fact
