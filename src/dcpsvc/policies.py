"""When to save and what to keep: pure values. They read no clock, touch no store and explain themselves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from dcpsvc.commits import Commit


def is_count(value: object) -> bool:
    """Whether a value is an int of at least 1, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: object) -> bool:
    """Whether a value is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_name(value: object) -> bool:
    """Whether a value is a text that people can read, and not empty."""
    return isinstance(value, str) and bool(value) and value.isprintable()


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

    @property
    def otherwise(self) -> str:
        """What is true of a checkpoint that :meth:`reasons` leaves out, for people."""
        return f"not kept by {self}"

    def remarks(self, commits: Sequence[Commit]) -> dict[Keep, str]:  # noqa: ARG002 - for rules that have any
        """What people should know about rules that cannot do what they say, a sentence for each such rule."""
        return {}

    def parts(self) -> tuple[Keep, ...]:
        """The rules it is made of."""
        return (self,)

    def __or__(self, other: Keep) -> Keep:
        """Keep what either keeps."""
        return AnyOf((*self.parts(), *other.parts()))


@dataclass(frozen=True, slots=True)
class AnyOf(Keep):
    """Keep what any of the rules keeps."""

    rules: tuple[Keep, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise ConfigError("AnyOf(()): a policy without rules keeps nothing")

    def parts(self) -> tuple[Keep, ...]:
        """Its rules."""
        return self.rules

    def reasons(self, commits: Sequence[Commit]) -> dict[Hashable, str]:
        """Join the reasons of all rules."""
        joined: dict[Hashable, str] = {}
        for rule in self.rules:
            for key, why in rule.reasons(commits).items():
                joined[key] = f"{joined[key]}, {why}" if key in joined else why
        return joined

    @property
    def otherwise(self) -> str:
        """What each of the rules says."""
        return ", ".join(rule.otherwise for rule in self.rules)

    def remarks(self, commits: Sequence[Commit]) -> dict[Keep, str]:
        """Those of all rules."""
        return {about: text for rule in self.rules for about, text in rule.remarks(commits).items()}

    def __str__(self) -> str:
        return " | ".join(map(str, self.rules))


@dataclass(frozen=True, slots=True)
class Everything(Keep):
    """Delete nothing: the default, because deleting is never done unasked."""

    def reasons(self, commits: Sequence[Commit]) -> dict[Hashable, str]:
        """All of them."""
        return {commit.key: "everything is kept" for commit in commits}

    def __str__(self) -> str:
        return "Everything()"


@dataclass(frozen=True, slots=True)
class Latest(Keep):
    """Keep the newest ``n`` by step."""

    n: int

    def __post_init__(self) -> None:
        if not is_count(self.n):
            raise ConfigError(f"Latest({self.n!r}): at least 1 checkpoint must be kept")

    def reasons(self, commits: Sequence[Commit]) -> dict[Hashable, str]:
        """The last ``n``, numbered from the newest."""
        newest = _sound(commits)[-self.n :][::-1]
        return {commit.key: f"latest {place} of {self.n}" for place, commit in enumerate(newest, 1)}

    @property
    def otherwise(self) -> str:
        """It is too old."""
        return f"not among the latest {self.n}"

    def __str__(self) -> str:
        return f"Latest({self.n})"


@dataclass(frozen=True, slots=True)
class Best(Keep):
    """Keep the best ``k`` by a metric, exactly; of equal ones the older. NaN and infinities are never best.

    A checkpoint whose metric comes later must live until then: join with ``Latest(n)``.

    Attributes:
        k: How many.
        metric: Name in ``metrics=``.
        mode: ``"min"``: smaller is better. ``"max"``: larger is.
    """

    k: int
    metric: str
    mode: str = ""

    def __post_init__(self) -> None:
        if not is_count(self.k):
            raise ConfigError(f"Best({self.k!r}, ...): at least 1 checkpoint must be kept")
        if not is_name(self.metric):
            raise ConfigError(f"Best({self.k}, {self.metric!r}): the metric must be named")
        if self.mode not in {"min", "max"}:
            raise ConfigError(f"Best({self.k}, {self.metric!r}, mode={self.mode!r}): mode must be 'min' or 'max'")

    def reasons(self, commits: Sequence[Commit]) -> dict[Hashable, str]:
        """The best ``k``, numbered from the best."""
        sign = 1.0 if self.mode == "min" else -1.0
        ranked = sorted(
            (sign * value, place) for place, value in enumerate(map(self._value, commits)) if value is not None
        )
        best = [commits[place] for _, place in ranked[: self.k]]
        return {
            commit.key: f"best {place} of {self.k} by {self.metric} ({commit.metrics[self.metric]:g})"
            for place, commit in enumerate(best, 1)
        }

    @property
    def otherwise(self) -> str:
        """Others are better, or it has no value to compare."""
        return f"not among the best {self.k} by {self.metric}"

    def remarks(self, commits: Sequence[Commit]) -> dict[Keep, str]:
        """A metric that checkpoints lack; the newest may get its own yet."""
        lacking = [commit for commit in _sound(commits)[:-1] if self.metric not in commit.metrics]
        if not lacking:
            return {}
        known = sorted({name for commit in commits for name in commit.metrics})
        have = f"they have {', '.join(known)}" if known else "they have no metrics at all"
        where = "no checkpoint has" if len(lacking) == len(_sound(commits)[:-1]) else f"step {lacking[0].step} has no"
        return {self: f"{self}: {where} {self.metric!r}, so it cannot be among the best; {have}"}

    def _value(self, commit: Commit) -> float | None:
        value = commit.metrics.get(self.metric, math.nan)
        return value if math.isfinite(value) and not commit.diverged else None

    def __str__(self) -> str:
        return f"Best({self.k}, {self.metric!r}, mode={self.mode!r})"


@dataclass(frozen=True, slots=True)
class EveryNSteps(Keep):
    """Keep each step divisible by ``n``, for ever."""

    n: int

    def __post_init__(self) -> None:
        if not is_count(self.n):
            raise ConfigError(f"EveryNSteps({self.n!r}): n must be an int of at least 1")

    def reasons(self, commits: Sequence[Commit]) -> dict[Hashable, str]:
        """The multiples."""
        return {commit.key: f"a multiple of {self.n} steps" for commit in _sound(commits) if commit.step % self.n == 0}

    @property
    def otherwise(self) -> str:
        """Its step is none."""
        return f"no multiple of {self.n} steps"

    def __str__(self) -> str:
        return f"EveryNSteps({self.n})"


@dataclass(frozen=True, slots=True)
class EveryHours(Keep):
    """Keep the first of each window of ``hours`` hours, for ever. Windows are counted in UTC from 1970.

    Fixed windows, because what is kept must not depend on what was deleted before.
    """

    hours: float

    def __post_init__(self) -> None:
        if not is_number(self.hours) or not 0 < self.hours < math.inf:
            raise ConfigError(f"EveryHours({self.hours!r}): hours must be a number above 0")

    def reasons(self, commits: Sequence[Commit]) -> dict[Hashable, str]:
        """One for each window that has any."""
        first: dict[int, Commit] = {}
        for commit in _sound(commits):
            if commit.created is not None:
                first.setdefault(int(commit.created.timestamp() // (self.hours * 3600)), commit)
        return {commit.key: f"first of its {self.hours:g} h" for commit in first.values()}

    @property
    def otherwise(self) -> str:
        """There is an older one."""
        return f"not the first of its {self.hours:g} h"

    def __str__(self) -> str:
        return f"EveryHours({self.hours:g})"


@dataclass(frozen=True, slots=True)
class Pinned(Keep):
    """Keep what is pinned. Pins are honoured by every policy; this says so, and must be joined with another rule."""

    def reasons(self, commits: Sequence[Commit]) -> dict[Hashable, str]:
        """Those with a pin."""
        return {commit.key: ", ".join(commit.pins) for commit in commits if commit.pins}

    @property
    def otherwise(self) -> str:
        """Nobody has pinned it."""
        return "not pinned"

    def __str__(self) -> str:
        return "Pinned()"


def check_keeps(rule: Keep) -> None:
    """Refuse a policy that by itself keeps nothing.

    Raises:
        ConfigError: It is made of ``Pinned()`` alone.
    """
    if all(isinstance(one, Pinned) for one in rule.parts()):
        raise ConfigError(f"keep={rule}: it keeps nothing until something is pinned; join it with Latest(n)")


def _sound(commits: Sequence[Commit]) -> list[Commit]:
    return [commit for commit in commits if not commit.diverged]
