"""What was looked at, what was found, and what to do about it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from dcpsvc import progress

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class Verdict(StrEnum):
    """How bad it is, mildest first."""

    OK = "ok"
    NOTE = "note"
    """Nothing to mend; good to know."""
    WARN = "warn"
    """Jobs work, and something will hurt."""
    FAIL = "fail"
    """Jobs do not work here."""


_ORDER = list(Verdict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What, in a word or two.
        verdict: How bad it is.
        found: What was measured or seen.
        remedy: What to do, in one line; empty where there is nothing to do.
    """

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the other ranks, and for people's scripts."""
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """What :meth:`to_json` gave."""
        return cls(**{**said, "verdict": Verdict(said["verdict"])})


def ok(name: str, found: str) -> Finding:
    """All is well."""
    return Finding(name=name, verdict=Verdict.OK, found=found)


def broken(name: str, err: BaseException, remedy: str) -> Finding:
    """A check that could not even be made."""
    return Finding(name=name, verdict=Verdict.FAIL, found=f"{type(err).__name__}: {err}", remedy=remedy)


def worst(findings: Iterable[Finding]) -> Verdict:
    """The verdict of all together."""
    return max((finding.verdict for finding in findings), key=_ORDER.index, default=Verdict.OK)


def merged(by_rank: Sequence[Sequence[Finding]]) -> list[Finding]:
    """One finding for each thing, however many ranks looked at it: the worst, with the ranks that found it. Pure.

    Args:
        by_rank: The findings of each rank, in rank order.
    """
    named: defaultdict[str, list[tuple[int, Finding]]] = defaultdict(list)
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            named[finding.name].append((rank, finding))
    return [_merge(found, len(by_rank)) for found in named.values()]


def _merge(found: list[tuple[int, Finding]], world_size: int) -> Finding:
    bad = worst(finding for _, finding in found)
    ranks = [rank for rank, finding in found if finding.verdict is bad]
    first = next(finding for _, finding in found if finding.verdict is bad)
    if bad in {Verdict.OK, Verdict.NOTE} or world_size == 1:
        return first
    named = (
        "all ranks"
        if len(ranks) == world_size
        else "ranks " + progress.ranges(ranks)
        if len(ranks) > 1
        else f"rank {ranks[0]}"
    )
    return replace(first, found=f"{named}: {first.found}")
