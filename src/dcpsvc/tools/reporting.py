"""``dcpsvc report``: one page about a run that needs only a browser, put together from what the run root tells."""

from __future__ import annotations

import base64
import json
import logging
import math
from collections import Counter, defaultdict
from datetime import UTC, datetime
from importlib.resources import files
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from dcpsvc.format import keys, run
from dcpsvc.observing import runlog
from dcpsvc.observing.phases import PHASES, SaveTimes, stragglers
from dcpsvc.tools import listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from dcpsvc.storage.base import Store
    from dcpsvc.tools.listing import Row

logger = logging.getLogger("dcpsvc")

_PLACE = "/*DATA*/"
_HEAT = ("blocked", *PHASES.values(), "total")
_SHADES = 254
_SHOWN = 200
"""Failures and stragglers that are listed; all are counted."""


def report(store: Store, *, folder: Path | None = None) -> str:
    """The page about :func:`collect`, as HTML that loads nothing from anywhere."""
    return page(collect(store, folder=folder))


def collect(store: Store, *, folder: Path | None = None) -> dict[str, Any]:
    """What the page shows, as JSON-like values; ``skipped`` names files of the log that could not be read.

    Args:
        store: The run root.
        folder: Logs that ranks have written on this machine (``RunLog(folder=...)``), beside those in the run root.

    Raises:
        StoreError: The run root could not be listed.
    """
    rows = listing.rows(store)
    saves, events, skipped = runlog.read(store)
    if folder is not None:
        more = runlog.read_folder(folder)
        saves, events = _without_twins([*saves, *more.saves]), _events_once([*events, *more.events])
        skipped += more.skipped
    if not saves:
        logger.warning("%s has no times of saves: jobs with run_log=True leave them there", store.url)
    about = {
        "root": store.url,
        "run_id": run.loads(store.url, store.get(keys.RUN, max_nbytes=run.MAX_NBYTES)).run_id,
        "generated": datetime.now(UTC).timestamp(),
        "skipped": skipped,
    }
    return about | gather(rows, saves, events)


def page(data: dict[str, Any]) -> str:
    """Put the data into the page. It can hold no end of a script: ``<`` is escaped."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return files("dcpsvc.tools").joinpath("report.html").read_text(encoding="utf-8").replace(_PLACE, text)


def gather(rows: Sequence[Row], saves: Sequence[SaveTimes], events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows, as JSON-like values: columns rather than rows, because there may be many. Pure.

    Args:
        rows: Of the listing, ascending by step.
        saves: Of all ranks.
        events: About the jobs, by time.
    """
    late = stragglers(saves)
    failures = [event for event in events if event["event"] == "save-failed" and event.get("detail")]
    return {
        "checkpoints": _columns(rows),
        "metrics": _metrics(rows),
        "policies": dict(_bytes_by_rule(rows)),
        "saves": _times(saves),
        "jobs": _jobs(saves, events),
        "failures": {
            "count": len({(event.get("step"), event.get("attempt")) for event in failures}),
            "last": [_failure(event) for event in failures[-_SHOWN:]],
        },
        "stragglers": {
            "ranks": Counter(str(one.who.rank) for one in late).most_common(20),
            "last": [str(one) for one in late[-_SHOWN:]],
        },
    }


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    found = [row.checkpoint for row in rows]
    return {
        "step": [one.step for one in found],
        "attempt": [one.attempt for one in found],
        "created": [None if one.created is None else one.created.timestamp() for one in found],
        "nbytes": [one.nbytes for one in found],
        "ranks": [one.world_size for one in found],
        "committed": [int(one.state == "committed") for one in found],
        "reason": [one.reason for one in found],
        "kept": [[] if row.goes else list(row.reasons) for row in rows],
        "goes": [list(row.reasons) if row.goes else [] for row in rows],
        "best": [int(row.best) for row in rows],
        "diverged": [int(one.diverged) for one in found],
    }


def _metrics(rows: Sequence[Row]) -> dict[str, list[Any]]:
    names = sorted({name for row in rows for name in row.checkpoint.metrics})
    return {name: [_number(row.checkpoint.metrics.get(name)) for row in rows] for name in names}


def _number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _bytes_by_rule(rows: Iterable[Row]) -> Counter[str]:
    """What each rule keeps; a checkpoint that several rules keep counts for each of them."""
    nbytes: Counter[str] = Counter()
    for row in rows:
        for rule in ("to be deleted",) if row.goes else row.rules:
            nbytes[rule] += row.checkpoint.nbytes
    return nbytes


def _times(saves: Sequence[SaveTimes]) -> dict[str, Any]:
    """For each attempt what the slowest rank took in each phase, and what each rank took, as shades of a picture."""
    by_attempt: defaultdict[tuple[int, str], list[SaveTimes]] = defaultdict(list)
    for save in saves:
        by_attempt[save.step, save.attempt].append(save)
    attempts = sorted(by_attempt, key=lambda key: (key[0], min(save.began for save in by_attempt[key])))
    ranks = 1 + max((save.rank for save in saves), default=-1)
    return {
        "step": [step for step, _ in attempts],
        "attempt": [attempt for _, attempt in attempts],
        "began": [min(save.began for save in by_attempt[key]) for key in attempts],
        "outcome": [_outcome(by_attempt[key]) for key in attempts],
        "slowest": {
            phase: [round(max(_took(save, phase) or 0.0 for save in by_attempt[key]), 4) for key in attempts]
            for phase in _HEAT
        },
        "ranks": ranks,
        "heat": {phase: _picture([by_attempt[key] for key in attempts], ranks, phase) for phase in _HEAT},
    }


def _outcome(saves: Iterable[SaveTimes]) -> str:
    """That of the job: the ranks agree, but for one that was killed."""
    return Counter(save.outcome for save in saves).most_common(1)[0][0]


def _took(save: SaveTimes, phase: str) -> float | None:
    if phase == "blocked":
        return save.blocked_s if save.waited else None
    return save.total_s if phase == "total" else save.seconds.get(phase)


def _picture(columns: Sequence[Sequence[SaveTimes]], ranks: int, phase: str) -> dict[str, Any]:
    """One byte for each attempt and rank: 0 where nothing is known, else the logarithm of the seconds."""
    timed = [(x, save.rank, _took(save, phase)) for x, column in enumerate(columns) for save in column]
    known = [(x, rank, max(seconds, 1e-6)) for x, rank, seconds in timed if seconds is not None]
    low = min((seconds for _, _, seconds in known), default=1.0)
    high = max((seconds for _, _, seconds in known), default=1.0)
    scale = _SHADES / math.log(high / low) if high > low else 0.0
    shades = bytearray(len(columns) * ranks)
    for x, rank, seconds in known:
        shades[x * ranks + rank] = 1 + round(scale * math.log(seconds / low))
    return {"low": low, "high": high, "shades": base64.b64encode(shades).decode()}


def _jobs(saves: Iterable[SaveTimes], events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """How long jobs ran, as rank 0 tells, and how long training waited meanwhile.

    One that was killed ran, as far as anybody knows, until its last save had ended.
    """
    own = [save for save in saves if save.rank == 0]
    edges = [event for event in events if event.get("rank") == 0 and event["event"] in {"opened", "closed"}]
    ran: list[tuple[float, float]] = []
    for event, after in zip_longest(edges, edges[1:]):
        if event["event"] == "opened":
            ran.append((event["t"], _end(event["t"], after, own)))
    within = (save.blocked_s for save in own if any(begin <= save.began <= end for begin, end in ran))
    return {"starts": len(ran), "seconds": sum(end - begin for begin, end in ran), "blocked_s": sum(within)}


def _end(begin: float, after: dict[str, Any] | None, saves: Iterable[SaveTimes]) -> float:
    if after is not None and after["event"] == "closed":
        return float(after["t"])
    until = math.inf if after is None else after["t"]
    return max((save.began + save.total_s for save in saves if begin <= save.began < until), default=begin)


def _failure(event: dict[str, Any]) -> dict[str, Any]:
    return {"t": event["t"], "step": event.get("step"), "rank": event.get("rank"), "detail": str(event["detail"])}


def _without_twins(saves: Iterable[SaveTimes]) -> list[SaveTimes]:
    """A rank's log may lie in the run root and here."""
    return list({(save.step, save.attempt, save.rank): save for save in saves}.values())


def _events_once(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    once = {(round(event["t"], 2), event["event"], event.get("rank")): event for event in events}
    return sorted(once.values(), key=lambda event: event["t"])
