"""Ack: the ranks agree on what to save, then tell each other what is durable.

Every message is a value. A rank that failed says so and why; it never leaves the others waiting.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dcpsvc import preflight
from dcpsvc.errors import LayoutError, RankFailure, StateMismatchError, StoreFullError
from dcpsvc.format import parts
from dcpsvc.format.adapter import AdapterFolder
from dcpsvc.format.manifest import ShardRecord
from dcpsvc.format.parse import Fields, compact
from dcpsvc.preflight import DiskNeed
from dcpsvc.ranks.rendezvous import Meeting, RefusalError
from dcpsvc.state import claims, fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from dcpsvc.format.layout import Layout
    from dcpsvc.format.parts import Part
    from dcpsvc.ranks.job import Job
    from dcpsvc.state.claims import Claims
    from dcpsvc.state.replicas import Held

_NAMED_DIFFERENCES = 3
_COMPARED_NBYTES = 16 << 20
"""A whole number of elements of any dtype."""
_TENSOR = re.compile(r"[A-Z]\w*\[[\d, ]*\] [a-z-]+( in full)?|part (?=[0-9a-f]{16})")
"""What a rank says of a tensor, without its hash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What one rank brings to the first meeting of an attempt.

    Attributes:
        step: Training step.
        said: What it would save, for comparison.
        part: Its part of the layout.
        known_layout: Digest of the layout it used last with this very part; empty if none.
        stamp: What the coordinator gives to the manifest: time, metrics, versions.
        disk: Room it needs on its local tier; None: it has not looked.
        bases: What it says about what of the modules is not saved.
    """

    step: int
    said: Claims
    part: Part
    known_layout: str
    stamp: Mapping[str, Any]
    disk: DiskNeed | None = None
    bases: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What all ranks go on with.

    Attributes:
        generation: Of our group; the next one if an operation timed out in the last.
        gather: Whether the parts of the layout must be exchanged, because somebody's changed.
        stamp: The coordinator's.
    """

    generation: int
    gather: bool
    stamp: dict[str, Any]


def agree(
    job: Job,
    place: str,
    proposal: Proposal | RankFailure,
    meeting: Meeting,
    make_room: Callable[[], Any],
    *,
    digests: Callable[[Claims], dict[str, str]] = claims.digests,
) -> Agreement:
    """The first meeting: all ranks here, same step, same structure, room on the disks. Uploader thread.

    Raises:
        DisagreementError: Ranks are missing, failed, would save different things, or have no room even when each has
            made some; the same on every rank.
    """
    verdict = job.meet(f"{place}/plan", _message(job, proposal, digests), _compare, meeting)
    if differ := verdict.get("differ"):
        assert isinstance(proposal, Proposal)  # noqa: S101 - a failure would have ended the meeting
        details = {name: proposal.said[name] for name in differ if name in proposal.said}
        job.meet(f"{place}/compare", details, functools.partial(_explain, "plan"), meeting)
    if verdict["short"]:
        job.meet(f"{place}/room", make_room(), _refuse_short, meeting)
    return Agreement(generation=verdict["generation"], gather=verdict["gather"], stamp=verdict["stamp"])


def agree_on_room(
    job: Job, place: str, need: DiskNeed | RankFailure, meeting: Meeting, make_room: Callable[[], Any]
) -> None:
    """Outside a save: whether the disks have room for all ranks. Any one thread.

    Raises:
        DisagreementError: They have not, even when every rank has made room; or ranks are missing or failed.
    """
    message = need if isinstance(need, RankFailure) else need.to_json()
    if job.meet(f"{place}/need", message, lambda needs: bool(_shortage(needs)), meeting):
        job.meet(f"{place}/room", make_room(), _refuse_short, meeting)


def gather_layout(job: Job, mine: Part) -> Layout:
    """Exchange the parts: of what several ranks have in common, one says it. Collective on our group; uploader thread.

    Raises:
        LayoutError: Together they do not cover every tensor exactly.
        LostPeerError: A peer died inside the collective.
    """
    owns = job.group.all_gather(mine.own)
    speakers = parts.speakers(owns)
    common = job.group.all_gather(mine.common if job.rank in speakers.values() else b"")
    return parts.merge(owns, {name: common[rank] for name, rank in speakers.items()})


def compare_bytes(job: Job, held: Mapping[str, Held]) -> None:
    """Compare what is to be compared byte by byte with rank 0's, a piece at a time.

    Collective on our group, after the ranks have agreed on the keys; uploader thread.

    Raises:
        StateMismatchError: Some differ; says where first and on which ranks, the same on every rank.
        LostPeerError: A peer died inside the collective.
    """
    if not held:
        return
    mine = {key: found for key in sorted(held) if (found := _first_difference(job, held[key])) is not None}
    said = [json.loads(data) for data in job.group.all_gather(compact(dict(list(mine.items())[:_NAMED_DIFFERENCES])))]
    if key := min((key for one in said for key in one), default=""):
        ranks = tuple(rank for rank, one in enumerate(said) if key in one)
        number, here, there = min(one[key] for one in said if key in one)
        reason = f"not the same on all ranks: element {number} is {here} on rank {ranks[0]} and {there} on rank 0"
        raise StateMismatchError(key, f"{reason}; ranks {ranks} differ from rank 0; broadcast it from one of them")


def _first_difference(job: Job, held: Held) -> tuple[int, str, str] | None:
    """Number of the first element that is another than on rank 0, and what it is here and there."""
    found: tuple[int, str, str] | None = None
    for begin in range(0, held.flat.numel(), _COMPARED_NBYTES):
        mine = held.flat[begin : begin + _COMPARED_NBYTES]
        theirs = job.group.broadcast(mine)
        if found is None and not torch.equal(mine, theirs):
            at = int((mine != theirs).nonzero()[0])
            found = held.difference(begin + at, theirs, begin)
    return found


_NOTHING: Claims = {}


class Acks(NamedTuple):
    """What the ranks said, in rank order.

    Attributes:
        records: Of their shards.
        took: What each gave as ``took``.
        adapter: The folder of PEFT beside one of the shards; None if there is none.
    """

    records: list[ShardRecord]
    took: list[tuple[float, ...]]
    adapter: AdapterFolder | None = None


def acknowledge(
    job: Job,
    place: str,
    phase: str,
    mine: ShardRecord | RankFailure,
    meeting: Meeting,
    *,
    took: Sequence[float] = (),
    values: Claims = _NOTHING,
    adapter: AdapterFolder | None = None,
) -> Acks:
    """Say "my shard is durable at this tier: here is my record", or why not; hear it from all. Uploader thread.

    All ranks arrive healthy on the store, with equal replicas, before the ``all_gather`` is entered.

    Args:
        job: The ranks.
        place: The attempt.
        phase: The tier.
        mine: Record or reason.
        meeting: Deadlines.
        took: Seconds to tell the others, a few; they travel as milliseconds.
        values: Hashes of what must be the same on all ranks.
        adapter: The folder of PEFT that is durable beside this rank's shard.

    Raises:
        DisagreementError: A rank failed or is missing, or replicas differ: which, on which ranks.
        LostPeerError: A peer died inside the collective.
    """
    arrival = mine if isinstance(mine, RankFailure) else claims.digests(values)
    if differ := job.meet(f"{place}/{phase}", arrival, claims.differing, meeting):
        details = {name: values[name] for name in differ if name in values}
        job.meet(f"{place}/compare", details, functools.partial(_explain, "ack"), meeting)
    assert isinstance(mine, ShardRecord)  # noqa: S101 - a failure would have ended the meeting
    folder = None if adapter is None else adapter.to_json()
    message = mine.to_json() | {"ms": [round(seconds * 1000) for seconds in took], "adapter": folder}
    said = job.group.all_gather(compact(message))
    fields = [Fields.parse(f"ack of rank {n}", data, LayoutError) for n, data in enumerate(said)]
    folders = [AdapterFolder.from_fields(found) for each in fields if (found := each.child_or_null("adapter"))]
    records, seconds = [ShardRecord.from_fields(each) for each in fields], [_took(each) for each in fields]
    return Acks(records, seconds, next(iter(folders), None))


def _took(fields: Fields) -> tuple[float, ...]:
    found = fields.get("ms", list)
    if not all(type(each) is int for each in found):
        raise fields.fail("ms: not a list of integers")
    return tuple(each / 1000 for each in found)


def _message(job: Job, proposal: Proposal | RankFailure, digests: Callable[[Claims], dict[str, str]]) -> Any:
    if isinstance(proposal, RankFailure):
        return proposal
    return {
        "step": proposal.step,
        "claims": digests(proposal.said),
        "layout": proposal.known_layout,
        "generation": job.group.generation + int(job.group.poisoned),
        "stamp": dict(proposal.stamp) if job.coordinates else None,
        "disk": proposal.disk.to_json() if proposal.disk else None,
        "bases": dict(proposal.bases),
    }


def _compare(messages: list[Any]) -> dict[str, Any]:
    layouts = {message["layout"] for message in messages}
    return {
        "differ": claims.differing([message["claims"] for message in messages]),
        "gather": layouts == {""} or len(layouts) > 1,
        "generation": max(message["generation"] for message in messages),
        "stamp": _stamp(messages),
        "short": bool(_shortage([message["disk"] for message in messages])),
    }


def _stamp(messages: list[Any]) -> dict[str, Any]:
    """The coordinator's, with what all ranks together know of the bases of adapters."""
    stamp: dict[str, Any] = messages[0]["stamp"]
    if bases := fingerprint.versions([message["bases"] for message in messages]):
        stamp["versions"] = stamp["versions"] | bases
    return stamp


def _shortage(needs: list[Any]) -> list[preflight.Shortage]:
    return preflight.shortage(DiskNeed.from_json(need) for need in needs if need is not None)


def _refuse_short(needs: list[Any]) -> None:
    if found := _shortage(needs):
        note = "what is whole at the run root was removed from it already, but for the newest checkpoint"
        raise RefusalError(
            [RankFailure(short.ranks[0], "plan", StoreFullError.__name__, f"{short}; {note}") for short in found]
        )


def _explain(phase: str, details: list[Any]) -> None:
    found = claims.disagreements(details)
    raise RefusalError([_difference(phase, key, answers) for key, answers in found[:_NAMED_DIFFERENCES]])


def _difference(phase: str, key: str, answers: dict[str, list[int]]) -> RankFailure:
    odd = min(answers.values(), key=len)
    text = "; ".join(f"{said} on ranks {tuple(ranks)}" for said, ranks in answers.items())
    said = f"{key} is not the same on all ranks: {text}"
    if not claims.is_option(key):
        said = f"{said}; {_remedy(answers)}"
    return RankFailure(odd[0], phase, "StateMismatchError", said)


def _remedy(answers: Iterable[str]) -> str:
    """What to do about a key of which the ranks say different things."""
    found = [_TENSOR.match(said) for said in answers]
    kinds = {match.group() if match else "" for match in found}
    if kinds == {""}:
        return "if each rank has its own, wrap it in PerRank, PerGroup or OneRank"
    if len(kinds) == 1:
        return "broadcast it, or Replicated(validate='off') if it may differ"
    return "if ranks have different ones, declare it: Part for a module, else PerRank, PerGroup or OneRank"
