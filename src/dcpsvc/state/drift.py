"""Where a checkpoint and the state in memory differ: all of it, as a table, before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dcpsvc.errors import StructureMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

_SHOWN, _NAMED = 30, 3


@dataclass(frozen=True, slots=True)
class Difference:
    """One key on which the two do not agree.

    Attributes:
        key: As the state in memory calls it.
        kind: ``missing`` in the checkpoint, ``unexpected`` there, ``shape``, ``dtype``, ``kind`` or ``ranks``.
        saved: What the checkpoint has.
        here: What the state has.
    """

    key: str
    kind: str
    saved: str
    here: str


@dataclass(frozen=True, slots=True)
class Terms:
    """What the user asked to be let pass.

    Attributes:
        strict: Whether keys that only one side has are refused.
        skip: Components, or dotted beginnings of keys, that are left as they are.
        rename: Dotted beginnings of saved keys, and what they are called here.
    """

    strict: bool = True
    skip: Sequence[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict[str, str])

    def skips(self, key: str) -> bool:
        """Whether a key of the state is to be left as it is."""
        return any(_begins(key, part) for part in self.skip)

    def saved_name(self, key: str) -> str:
        """What a key of the state is called in the checkpoint."""
        fitting = [(new, old) for old, new in self.rename.items() if _begins(key, new)]
        if not fitting:
            return key
        new, old = max(fitting, key=lambda pair: len(pair[0]))
        return old + key[len(new) :]

    def name_here(self, saved: str) -> str:
        """What a saved key is called here."""
        fitting = [(old, new) for old, new in self.rename.items() if _begins(saved, old)]
        if not fitting:
            return saved
        old, new = max(fitting, key=lambda pair: len(pair[0]))
        return new + saved[len(old) :]


@dataclass(slots=True)
class Drift:
    """Collects differences while the components look at a checkpoint.

    Attributes:
        step: Of the checkpoint.
        strict: Whether what only one side has is refused.
        found: What is refused.
        passed: What only one side has, and is let pass.
        own: This rank speaks for others, too, of what rank 0 does not know.
    """

    step: int = 0
    strict: bool = True
    found: list[Difference] = field(default_factory=list[Difference])
    passed: list[Difference] = field(default_factory=list[Difference])
    own: bool = False

    def add(self, key: str, kind: str, saved: str, here: str) -> None:
        """Note one: it is refused, unless it is let pass."""
        refused = self.strict or kind not in {"missing", "unexpected"}
        (self.found if refused else self.passed).append(Difference(key, kind, saved, here))

    def let_pass(self, key: str, kind: str, saved: str, here: str) -> None:
        """Note one that is told only."""
        self.passed.append(Difference(key, kind, saved, here))

    def check(self) -> None:
        """Refuse if there is any.

        Raises:
            StructureMismatchError: With the table of all of them.
        """
        if self.found:
            found = _sorted(self.found)
            raise StructureMismatchError(found[0].key, _reason(self.step, found))

    def summary(self) -> str:
        """How much was let pass, with the names of a few; empty if nothing was."""
        missing = [one.key for one in _sorted(self.passed) if one.kind == "missing"]
        unused = [one.key for one in _sorted(self.passed) if one.kind == "unexpected"]
        parts = [f"{len(missing)} not in the checkpoint, so not loaded: {_few(missing)}"] if missing else []
        parts += [f"{len(unused)} of the checkpoint not used: {_few(unused)}"] if unused else []
        return "; ".join(parts)

    def table(self) -> str:
        """What was let pass, a line each."""
        return _table(_sorted(self.passed))


def described(tensor: torch.Tensor) -> str:
    """Dtype and shape, for people."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _sorted(differences: Iterable[Difference]) -> list[Difference]:
    return sorted(differences, key=lambda one: (one.key, one.kind))


def _few(keys: Sequence[str]) -> str:
    return ", ".join([*keys[:_NAMED], *(["..."] if len(keys) > _NAMED else [])])


def _reason(step: int, found: Sequence[Difference]) -> str:
    count = f"{len(found)} difference{'s' if len(found) > 1 else ''}"
    ways = "skip=['key'] leaves a key as it is, rename={'saved': 'here'} maps names, strict=False lets missing and "
    return f"{count} between the checkpoint of step {step} and the state\n{_table(found)}\n{ways}unexpected ones pass"


def _table(found: Sequence[Difference]) -> str:
    rows = [("key", "difference", "saved", "here"), *((d.key, d.kind, d.saved, d.here) for d in found[:_SHOWN])]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([*lines, *_more(len(found) - _SHOWN)])


def _more(count: int) -> Iterable[str]:
    return [f"  ... and {count} more"] if count > 0 else []


def _begins(key: str, part: str) -> bool:
    return key == part or key.startswith(f"{part}.")
