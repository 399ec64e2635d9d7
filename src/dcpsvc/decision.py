"""Applying a policy to everything that is committed: what stays and why, what goes and why. Pure."""

from __future__ import annotations

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
    the rule, and the others stay as long as it does.

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
    for commit in commits:
        if last[commit.step].key in keep:
            keep.setdefault(commit.key, f"a later attempt of step {commit.step} stays")
    _keep_what_they_need(keep, commits)
    return Decision(keep, {commit.key: _why_not(rule, commit) for commit in commits if commit.key not in keep})


def _keep_what_they_need(keep: dict[Hashable, str], commits: Sequence[Commit]) -> None:
    """A checkpoint whose files another one names stays with it; and so on."""
    by_key = {commit.key: commit for commit in commits}
    unseen = [by_key[key] for key in keep]
    while unseen:
        user = unseen.pop()
        for key in user.needs:
            if key in by_key and key not in keep:
                keep[key] = f"step {user.step} uses its files"
                unseen.append(by_key[key])


def _why_not(rule: Keep, commit: Commit) -> str:
    return DIVERGED if commit.diverged else rule.otherwise
