"""Names of every object in a run root, and the only place that parses them.

::

    run.json
    manifests/step-000000000500.<attempt>.json
    manifests/epochs/00000007.<token>.json            one start of a job has taken the run root over
    manifests/epochs/00000007.<token>.inherited.json  what was committed then
    layouts/<digest>.json
    data/step-000000000500.<attempt>/rank-00003.safetensors
    tombstones/step-000000000500.<attempt>.json
    probes/<token>
    lineage/step-000000000500.<attempt>.json          where a checkpoint comes from that no training step wrote
    events/<start>-<token>.rank-00003.jsonl           what one rank of one start of a job has to tell
"""

from __future__ import annotations

import re
from typing import NamedTuple

RUN = "run.json"
MANIFESTS = "manifests/"
EPOCHS = f"{MANIFESTS}epochs/"
LAYOUTS = "layouts/"
DATA = "data/"
TOMBSTONES = "tombstones/"
PROBES = "probes/"
LINEAGE = "lineage/"
EVENTS = "events/"

MAX_STEP = 10**12 - 1
MAX_EPOCH = 10**8 - 1

_ATTEMPT = r"[0-9a-z](?:[0-9a-z-]{0,62}[0-9a-z])?"
_NAME = rf"step-(?P<step>[0-9]{{12}})\.(?P<attempt>{_ATTEMPT})"
_MANIFEST = re.compile(rf"{MANIFESTS}{_NAME}\.json")
_TOMBSTONE = re.compile(rf"{TOMBSTONES}{_NAME}\.json")
_SHARD = re.compile(rf"{DATA}{_NAME}/rank-(?P<rank>[0-9]{{5,}})\.safetensors")
_FOLDER = re.compile(rf"{DATA}{_NAME}/")
_LAYOUT = re.compile(rf"{LAYOUTS}(?P<digest>[0-9a-f]{{32}})\.json")


_EPOCH = re.compile(rf"{EPOCHS}(?P<number>[0-9]{{8}})\.(?P<token>[0-9a-f]{{8}})(?P<inherited>\.inherited)?\.json")
_OF_EPOCH = re.compile(r"(?P<number>[1-9][0-9]{0,7})-(?P<token>[0-9a-f]{8})-[0-9]+")


class Epoch(NamedTuple):
    """One start of a job, as the owner of a run root. The largest owns it."""

    number: int
    token: str

    @property
    def claim(self) -> str:
        """Key of the note that this job has taken over."""
        return f"{EPOCHS}{self.number:08d}.{self.token}.json"

    @property
    def inheritance(self) -> str:
        """Key of the list of what was committed when it took over."""
        return f"{EPOCHS}{self.number:08d}.{self.token}.inherited.json"

    def attempt(self, step: int, number: int) -> Attempt:
        """The ``number``-th try of this job to save a step."""
        return Attempt(step, f"{self.number}-{self.token}-{number}")


NO_EPOCH = Epoch(0, "")
"""Of attempts that no job of ours has named."""


class Attempt(NamedTuple):
    """One try to save one step. Sorts by step."""

    step: int
    attempt: str

    @property
    def epoch(self) -> Epoch:
        """The start of the job that made it."""
        match = _OF_EPOCH.fullmatch(self.attempt)
        return Epoch(int(match["number"]), match["token"]) if match else NO_EPOCH

    def __str__(self) -> str:
        return f"step-{self.step:012d}.{self.attempt}"

    @property
    def manifest(self) -> str:
        """Key of the commit record."""
        return f"{MANIFESTS}{self}.json"

    @property
    def tombstone(self) -> str:
        """Key of the note that this checkpoint is being deleted."""
        return f"{TOMBSTONES}{self}.json"

    @property
    def lineage(self) -> str:
        """Key of the note where it comes from, if no training step wrote it."""
        return f"{LINEAGE}{self}.json"

    @property
    def data(self) -> str:
        """Prefix of every shard."""
        return f"{DATA}{self}/"

    def shard(self, rank: int) -> str:
        """Key of one rank's shard."""
        return f"{self.data}rank-{rank:05d}.safetensors"


def events(started: str, token: str, rank: int) -> str:
    """Key of what one rank of one start of a job has to tell."""
    return f"{EVENTS}{started}-{token}.rank-{rank:05d}.jsonl"


def layout(digest: str) -> str:
    """Key of a layout."""
    return f"{LAYOUTS}{digest}.json"


def attempt_of(key: str) -> Attempt | None:
    """The attempt a manifest, tombstone or shard key belongs to; None for a name that is not ours."""
    for pattern in (_MANIFEST, _SHARD, _TOMBSTONE):
        if match := pattern.fullmatch(key):
            return Attempt(int(match["step"]), match["attempt"])
    return None


def epoch_of(key: str) -> tuple[Epoch, bool] | None:
    """The epoch a claim or an inheritance belongs to, and whether it is an inheritance; None for other keys."""
    match = _EPOCH.fullmatch(key)
    return (Epoch(int(match["number"]), match["token"]), match["inherited"] is not None) if match else None


def rank_of(key: str) -> int | None:
    """The rank that wrote a shard; None for other keys."""
    match = _SHARD.fullmatch(key)
    return int(match["rank"]) if match else None


def attempt_below(key: str) -> Attempt | None:
    """The attempt in whose data folder a key lies, whatever the file is called; None elsewhere."""
    match = _FOLDER.match(key)
    return Attempt(int(match["step"]), match["attempt"]) if match else None


def is_shard(key: str) -> bool:
    """Whether a key names a shard of ours; nothing else may be read on a manifest's word."""
    return _SHARD.fullmatch(key) is not None


def is_layout(key: str) -> bool:
    """Whether a key names a layout of ours."""
    return _LAYOUT.fullmatch(key) is not None
