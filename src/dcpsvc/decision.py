"""Applying a policy to everything that is committed: what stays and why, what goes and why. Pure."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc.commits import DIVERGED

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from dcpsvc.commits import Commit
    from dcpsvc.policies import Keep


@dataclass(frozen=True, slots=True)
class Decision:
    """What to keep and what to delete, oldest first, each with its reason."""

    keep: dict[Hashable, str]
    remove: dict[Hashable, str]


def decide(rule: Keep, commits: Sequence[Commit], *, protected: Mapping[Hashable, str]) -> Decision:
    """Apply a rule. Some are never removed, whatever it says.

    The newest commit, and the newest that did not diverge; what is pinned, being read, or ``protected``; and whatever
    holds files of one that is kept. Of a step that was committed again, as by an edit, only the last attempt counts for
    the rule; and if any of its attempts stays, for whatever reason, so do the others: without the last one, the step
    would silently be again what it was before the edit.

    Args:
        rule: What the user asked for.
        commits: Every valid commit, ascending by step, those of one step by age. Damaged ones do not belong here: they
            must not push a good one out.
        protected: Further checkpoints in use, with the reason.
    """
    last = {commit.step: commit for commit in commits}
    keep = dict(rule.reasons(list(last.values())))
    for commit in commits:
        said = keep.get(commit.key, "")
        uses = [why for why in (*commit.pins, protected.get(commit.key, "")) if why and why not in said]
        if uses:
            keep[commit.key] = ", ".join([said, *uses] if said else uses)
    for newest, why in ((commits, "newest commit"), ([c for c in commits if not c.diverged], "newest that is sound")):
        if newest:
            keep.setdefault(newest[-1].key, why)
    _keep_what_goes_with_them(keep, commits)
    return Decision(keep, {commit.key: _why_not(rule, commit) for commit in commits if commit.key not in keep})


def _keep_what_goes_with_them(keep: dict[Hashable, str], commits: Sequence[Commit]) -> None:
    """The other attempts of a step, and whose files it names, stay with it; and so on."""
    by_key = {commit.key: commit for commit in commits}
    attempts: defaultdict[int, list[Hashable]] = defaultdict(list)
    for commit in commits:
        attempts[commit.step].append(commit.key)
    unseen = [by_key[key] for key in keep]
    while unseen:
        one = unseen.pop()
        with_it = dict.fromkeys(attempts[one.step], f"another attempt of step {one.step} stays")
        with_it |= dict.fromkeys(one.needs, f"step {one.step} uses its files")
        for key, why in with_it.items():
            if key in by_key and key not in keep:
                keep[key] = why
                unseen.append(by_key[key])


def _why_not(rule: Keep, commit: Commit) -> str:
    return DIVERGED if commit.diverged else rule.otherwise
