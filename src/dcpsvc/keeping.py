"""Why each checkpoint of a run root is there, and what its policy lets go. Reads; deletes nothing; needs no torch.

::

    notes = SideFiles(store)
    found = discover.look(store, notes)
    plan = keeping.plan(store, found, notes)
    for one in found:
        print(one.checkpoint.step, plan.keep.get(one.checkpoint.key) or plan.remove.get(one.checkpoint.key, ""))
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from dcpsvc.commits import Commit
from dcpsvc.decision import Decision, decide
from dcpsvc.errors import FormatError, StoreNotFoundError
from dcpsvc.format import keys, policy
from dcpsvc.format.keys import Attempt
from dcpsvc.policies import Best, Everything

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from dcpsvc.format.keys import Epoch
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.policies import Keep
    from dcpsvc.sidefiles import SideFiles
    from dcpsvc.stages.discover import Seen
    from dcpsvc.storage.base import Store

logger = logging.getLogger("dcpsvc")

_KEPT_POLICIES = 3
"""Starts of the job whose policies stay, for people who wonder what happened."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a policy says about a run root as it is now.

    Attributes:
        policy: How it reads; empty if none is recorded.
        keep: Why each checkpoint stays.
        remove: Why it may go, oldest first.
        remarks: What is odd about the policy, a sentence each.
        rules: The rules that keep each checkpoint, as they read, and ``pinned``; empty if it stays for another reason.
        best: Those that a :class:`~dcpsvc.policies.Best` keeps.
    """

    policy: str
    keep: dict[Attempt, str]
    remove: dict[Attempt, str]
    remarks: tuple[str, ...] = ()
    rules: dict[Attempt, tuple[str, ...]] = field(default_factory=dict["Attempt", tuple[str, ...]])
    best: frozenset[Attempt] = frozenset()


def plan(
    store: Store,
    found: Sequence[Seen],
    notes: SideFiles,
    rule: Keep | None = None,
    *,
    now_s: float | None = None,
) -> Plan:
    """Why each checkpoint is there. What the live job has in use beside that, only the job knows.

    Args:
        store: The run root.
        found: As :func:`~dcpsvc.stages.discover.look` gave them; what is no checkpoint is left out.
        notes: As the listing used it.
        rule: None takes what the newest start of the job has recorded; a policy that cannot be read back keeps all.
        now_s: Seconds since 1970; None is now.
    """
    text, known = (str(rule), rule) if rule is not None else recorded(store)
    pins = notes.pins(time.time() if now_s is None else now_s)
    commits = [
        Commit(
            step=one.checkpoint.step,
            key=one.checkpoint.key,
            created=one.checkpoint.created,
            metrics=one.checkpoint.metrics,
            pins=pins.get(one.checkpoint.key, ()),
            needs=needs(one.manifest),
        )
        for one in found
        if one.counts and one.manifest is not None
    ]
    decision = decide(known or Everything(), commits, protected={})
    if known is None:
        unknown = f"the policy {text} is not one of dcpsvc's own" if text else "no policy is recorded"
        decision = Decision({commit.key: ", ".join((*commit.pins, unknown)) for commit in commits}, {})
    remarks = () if known is None else tuple(known.remarks(commits).values())
    rules, best = _by_rule(known, commits)
    return Plan(text, _attempts(decision.keep), _attempts(decision.remove), remarks, rules, best)


def _by_rule(rule: Keep | None, commits: Sequence[Commit]) -> tuple[dict[Attempt, tuple[str, ...]], frozenset[Attempt]]:
    found: defaultdict[Hashable, list[str]] = defaultdict(list)
    best: set[Hashable] = set()
    for part in () if rule is None else rule.parts():
        kept = part.reasons(commits)
        best |= kept.keys() if isinstance(part, Best) else set()
        for key in kept:
            found[key].append(str(part))
    for commit in commits:
        if commit.pins:
            found[commit.key].append("pinned")
    named = {key: tuple(rules) for key, rules in found.items() if isinstance(key, Attempt)}
    return named, frozenset(key for key in best if isinstance(key, Attempt))


def commits_of(manifests: Sequence[Manifest], notes: SideFiles, now_s: float) -> list[Commit]:
    """What a policy may know about valid commits, ascending by step.

    Args:
        manifests: Of them.
        notes: What lies beside them.
        now_s: Seconds since 1970, for pins that end by themselves.
    """
    metrics, pins = notes.metrics({found.key: found.metrics for found in manifests}), notes.pins(now_s)
    return [
        Commit(
            step=found.step,
            key=found.key,
            created=datetime.fromisoformat(found.created),
            metrics=metrics[found.key],
            pins=pins.get(found.key, ()),
            needs=needs(found),
        )
        for found in manifests
    ]


def record_policy(store: Store, epoch: Epoch, rule: Keep) -> None:
    """Write down what this start of the job keeps; those of older starts go, but for the last few."""
    store.create(epoch.policy, policy.dumps(epoch, rule))
    for older in _recorded(store):
        if older.number < epoch.number - _KEPT_POLICIES:
            store.delete(older.policy)


def recorded(store: Store) -> tuple[str, Keep | None]:
    """How the policy reads that the newest start of the job has recorded, and the policy, if it is one of ours."""
    for epoch in sorted(_recorded(store), reverse=True):
        try:
            return policy.loads(epoch.policy, store.get(epoch.policy, max_nbytes=policy.MAX_NBYTES))
        except (FormatError, StoreNotFoundError) as err:
            logger.warning("a policy is passed over: %s", err)
    return "", None


def _recorded(store: Store) -> list[Epoch]:
    return [epoch for entry in store.list(keys.POLICIES) if (epoch := keys.policy_of(entry.key)) is not None]


def needs(found: Manifest) -> frozenset[Attempt]:
    """Other checkpoints in whose folders files of this one lie."""
    own = found.key.data
    owners = {keys.attempt_of(shard.path) for shard in found.shards if not shard.path.startswith(own)}
    return frozenset(owner for owner in owners if owner is not None)


def _attempts(reasons: Mapping[Hashable, str]) -> dict[Attempt, str]:
    return {key: why for key, why in reasons.items() if isinstance(key, Attempt)}
