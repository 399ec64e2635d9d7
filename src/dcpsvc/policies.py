"""When to save and what to keep: pure values. They read no clock, touch no store and explain themselves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dcpsvc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence


def is_count(value: object) -> bool:
    """Whether a value is an int of at least 1, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: object) -> bool:
    """Whether a value is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


class Commit(Protocol):
    """What a policy may know about a committed checkpoint."""

    @property
    def step(self) -> int:
        """Training step."""
        ...

    @property
    def key(self) -> Hashable:
        """Its identity: step and attempt."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """Numbers recorded with it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Every:
    """Save every ``steps`` steps, or every ``seconds`` seconds, or whichever comes first.

    Attributes:
        steps: Save at each step divisible by it.
        seconds: Time between two saves. The ranks agree on the step in the background, so a save comes a
            few steps after it is due.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise ConfigError("Every() needs steps= or seconds=")
        if self.steps is not None and not is_count(self.steps):
            raise ConfigError(f"Every(steps={self.steps!r}): steps must be an int of at least 1")
        if self.seconds is not None and not (is_number(self.seconds) and 0 < self.seconds < math.inf):
            raise ConfigError(f"Every(seconds={self.seconds!r}): seconds must be a number above 0")

    def due(self, step: int) -> bool:
        """Whether ``step`` itself says so; every rank computes the same."""
        return self.steps is not None and step % self.steps == 0


class Keep(ABC):
    """A rule that names the checkpoints it wants kept. Rules join with ``|``: kept if any rule keeps it."""

    @abstractmethod
    def reasons(self, commits: Sequence[Commit]) -> dict[Hashable, str]:
        """The checkpoints to keep and why, of ``commits`` in ascending step order."""

    def __or__(self, other: Keep) -> Keep:
        """Keep what either keeps."""
        return AnyOf((self, other))


@dataclass(frozen=True, slots=True)
class AnyOf(Keep):
    """Keep what any of the rules keeps."""

    rules: tuple[Keep, ...]

    def reasons(self, commits: Sequence[Commit]) -> dict[Hashable, str]:
        """Join the reasons of all rules."""
        joined: dict[Hashable, str] = {}
        for rule in self.rules:
            for key, why in rule.reasons(commits).items():
                joined[key] = f"{joined[key]}, {why}" if key in joined else why
        return joined


@dataclass(frozen=True, slots=True)
class Everything(Keep):
    """Delete nothing: the default, because deleting is never done unasked."""

    def reasons(self, commits: Sequence[Commit]) -> dict[Hashable, str]:
        """All of them."""
        return {commit.key: "everything is kept" for commit in commits}


@dataclass(frozen=True, slots=True)
class Latest(Keep):
    """Keep the newest ``n`` by step."""

    n: int

    def __post_init__(self) -> None:
        if not is_count(self.n):
            raise ConfigError(f"Latest({self.n!r}): at least 1 checkpoint must be kept")

    def reasons(self, commits: Sequence[Commit]) -> dict[Hashable, str]:
        """The last ``n``, numbered from the newest."""
        newest = list(commits)[-self.n :][::-1]
        return {commit.key: f"latest {place} of {self.n}" for place, commit in enumerate(newest, 1)}


@dataclass(frozen=True, slots=True)
class Decision:
    """What to keep, why, and what to delete, oldest first."""

    keep: dict[Hashable, str]
    remove: tuple[Hashable, ...]


def decide(rule: Keep, commits: Sequence[Commit], *, protected: Mapping[Hashable, str]) -> Decision:
    """Apply a rule. The newest commit and everything ``protected`` are never removed, whatever the rule says.

    Args:
        rule: What the user asked for.
        commits: Every valid commit, ascending by step. Damaged ones do not belong here: they must not
            push a good one out.
        protected: Further checkpoints in use, with the reason.
    """
    keep = dict(rule.reasons(commits))
    present = {commit.key for commit in commits}
    if commits:
        keep.setdefault(commits[-1].key, "newest commit")
    for key, why in protected.items():
        if key in present:
            keep.setdefault(key, why)
    return Decision(keep, tuple(commit.key for commit in commits if commit.key not in keep))
