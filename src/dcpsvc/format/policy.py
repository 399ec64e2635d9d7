"""The policy a start of the job keeps by, written down so that a stranger can say why a checkpoint is there."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import ConfigError, FormatError
from dcpsvc.format.keys import policy_of
from dcpsvc.format.manifest import FORMAT
from dcpsvc.format.parse import Fields
from dcpsvc.format.seal import check_seal, seal
from dcpsvc.policies import AnyOf, Best, EveryHours, EveryNSteps, Everything, Keep, Latest, Pinned

if TYPE_CHECKING:
    from dcpsvc.format.keys import Epoch

MAX_NBYTES = 1 << 20
_MAX_RULES = 1000
_KINDS = (Everything, Latest, Best, EveryNSteps, EveryHours, Pinned)
_KNOWN = {kind.__name__: kind for kind in _KINDS}


def dumps(epoch: Epoch, rule: Keep) -> bytes:
    """The file's content. A rule of the user's own is written down by its name, and cannot be read back."""
    about = {"format": FORMAT, "epoch": epoch.number, "token": epoch.token}
    return seal(about | {"text": str(rule)[:500], "keep": [_rule(one) for one in rule.parts()]})


def loads(path: str, data: bytes) -> tuple[str, Keep | None]:
    """How a policy reads, and the policy; None if a rule of it is not one of ours.

    Raises:
        FormatError: It is not one.
    """
    fields = Fields.parse(path, data, FormatError)
    if (version := fields.get("format", int)) != FORMAT:
        raise fields.fail(f"format version {version}, this package reads {FORMAT}")
    check_seal(fields)
    named = policy_of(path)
    if named is None or [*named] != [fields.get("epoch", int), fields.get("token", str)]:
        raise fields.fail("its content is of another epoch")
    rules = fields.children("keep")
    if not 0 < len(rules) <= _MAX_RULES:
        raise fields.fail(f"{len(rules)} rules")
    found = [_parse(rule) for rule in rules]
    whole = [rule for rule in found if rule is not None]
    return fields.text("text", str.isprintable), AnyOf(tuple(whole)) if len(whole) == len(found) else None


def _rule(rule: Keep) -> dict[str, Any]:
    values = asdict(rule) if isinstance(rule, _KINDS) else {}
    return {"rule": type(rule).__name__} | values


def _parse(fields: Fields) -> Keep | None:
    kind = _KNOWN.get(fields.get("rule", str))
    if kind is None:
        return None
    try:
        return kind(**{name: value for name, value in fields.items() if name != "rule"})
    except (ConfigError, TypeError) as err:
        raise fields.fail(f"a rule that makes no sense: {err}") from err


def parse(text: str) -> Keep:
    """A policy as people type it: ``latest:3,best:2:loss:min,steps:1000,hours:6,pinned``.

    Raises:
        ConfigError: It is none, or a rule of it makes no sense.
    """
    rules = [_typed(text, *one.strip().split(":")) for one in text.split(",")]
    return AnyOf(tuple(rules)) if len(rules) > 1 else rules[0]


def _typed(text: str, name: str, *given: str) -> Keep:
    kind, *kinds = _TYPED.get(name, (None,))
    if kind is None or len(given) != len(kinds):
        forms = ", ".join(_FORMS)
        raise ConfigError(f"keep {text!r}: {':'.join((name, *given))!r} is no rule; rules are {forms}")
    try:
        values = [convert(value) for convert, value in zip(kinds, given, strict=True)]
    except ValueError as err:
        raise ConfigError(f"keep {text!r}: {err}") from err
    rule: Keep = kind(*values)
    return rule


_TYPED: dict[str, tuple[Any, ...]] = {
    "all": (Everything,),
    "latest": (Latest, int),
    "best": (Best, int, str, str),
    "steps": (EveryNSteps, int),
    "hours": (EveryHours, float),
    "pinned": (Pinned,),
}
_FORMS = ("all", "latest:N", "best:K:METRIC:min|max", "steps:N", "hours:H", "pinned")
