"""Names of every object in a run root, and the only place that parses them.

::

    run.json
    manifests/order-999999999499.step-000000000500.<attempt>.json
    manifests/epochs/00000007.<token>.json            one start of a job has taken the run root over
    manifests/epochs/00000007.<token>.inherited.json  what was committed then
    layouts/<digest>.json
    data/step-000000000500.<attempt>/rank-00003.safetensors
    data/step-000000000500.<attempt>/adapter/adapter_model.safetensors  a folder of PEFT, made of the shards
    metrics/step-000000000500.<attempt>/00000001.<token>.json  numbers recorded after the commit
    pins/step-000000000500.<attempt>/<token>.json              it must stay
    pins/step-000000000500.<attempt>/<token>.until-001763690000.json  until then: somebody reads it
    policies/00000007.<token>.json                    what that start of the job keeps
    tombstones/step-000000000500.<attempt>.json
    probes/<token>
    lineage/step-000000000500.<attempt>.json          where a checkpoint comes from that no training step wrote
    events/<start>-<token>.rank-00003.00000.jsonl     what one rank of one start of a job has to tell, in segments

Listings come in the order of the names and, at S3, 1,000 at a time. So the name of a manifest begins with a number that
falls while the step grows, and claims sort before manifests: the first page of one LIST has every claim, and the newest
manifests, however many there are.
"""

from __future__ import annotations

import re
from typing import NamedTuple

RUN = "run.json"
MANIFESTS = "manifests/"
EPOCHS = f"{MANIFESTS}epochs/"
COMMITS = f"{MANIFESTS}order-"
LAYOUTS = "layouts/"
DATA = "data/"
METRICS = "metrics/"
PINS = "pins/"
POLICIES = "policies/"
TOMBSTONES = "tombstones/"
PROBES = "probes/"
LINEAGE = "lineage/"
EVENTS = "events/"

MAX_STEP = 10**12 - 1
MAX_EPOCH = 10**8 - 1
MAX_RECORDS = 10**8 - 1
MAX_UNTIL_S = 10**12 - 1

_ATTEMPT = r"[0-9a-z](?:[0-9a-z-]{0,62}[0-9a-z])?"
_NAME = rf"step-(?P<step>[0-9]{{12}})\.(?P<attempt>{_ATTEMPT})"
_MANIFEST = re.compile(rf"{COMMITS}(?P<order>[0-9]{{12}})\.{_NAME}\.json")
_TOMBSTONE = re.compile(rf"{TOMBSTONES}{_NAME}\.json")
_SHARD = re.compile(rf"{DATA}{_NAME}/rank-(?P<rank>[0-9]{{5,}})\.safetensors")
_ADAPTER = re.compile(
    rf"{DATA}{_NAME}/adapter/(?:[A-Za-z0-9_][A-Za-z0-9_.-]*/)?adapter_(?:config\.json|model\.safetensors)"
)
_FOLDER = re.compile(rf"{DATA}{_NAME}/")
_LAYOUT = re.compile(rf"{LAYOUTS}(?P<digest>[0-9a-f]{{32}})\.json")
_METRICS = re.compile(rf"{METRICS}{_NAME}/(?P<number>[0-9]{{8}})\.(?P<token>[0-9a-f]{{8}})\.json")
_PIN = re.compile(rf"{PINS}{_NAME}/(?P<token>[0-9a-f]{{8}})(?:\.until-(?P<until>[0-9]{{12}}))?\.json")
_BESIDE = re.compile(rf"(?:{METRICS}|{PINS}){_NAME}/")
_LINEAGE = re.compile(rf"{LINEAGE}{_NAME}\.json")
_POLICY = re.compile(rf"{POLICIES}(?P<number>[0-9]{{8}})\.(?P<token>[0-9a-f]{{8}})\.json")
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

    @property
    def policy(self) -> str:
        """Key of the note of what it keeps."""
        return f"{POLICIES}{self.number:08d}.{self.token}.json"

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
        return f"{COMMITS}{MAX_STEP - self.step:012d}.{self}.json"

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

    @property
    def adapter(self) -> str:
        """Prefix of its folder of PEFT."""
        return f"{self.data}adapter/"

    @property
    def metrics(self) -> str:
        """Prefix of the numbers that were recorded after the commit."""
        return f"{METRICS}{self}/"

    @property
    def pins(self) -> str:
        """Prefix of the notes that it must stay."""
        return f"{PINS}{self}/"

    def record(self, number: int, token: str) -> str:
        """Key of the ``number``-th note of metrics; what a later one says counts."""
        return f"{self.metrics}{number:08d}.{token}.json"

    def pin(self, token: str, until_s: int | None = None) -> str:
        """Key of a pin; with ``until_s`` (seconds since 1970) one that ends by itself."""
        end = "" if until_s is None else f".until-{until_s:012d}"
        return f"{self.pins}{token}{end}.json"

    def shard(self, rank: int) -> str:
        """Key of one rank's shard."""
        return f"{self.data}rank-{rank:05d}.safetensors"


def events(started: str, token: str, rank: int, segment: int) -> str:
    """Key of a part of what one rank of one start of a job has to tell."""
    return f"{EVENTS}{started}-{token}.rank-{rank:05d}.{segment:05d}.jsonl"


def layout(digest: str) -> str:
    """Key of a layout."""
    return f"{LAYOUTS}{digest}.json"


def attempt_of(key: str) -> Attempt | None:
    """The attempt a manifest, tombstone or shard key belongs to; None for a name that is not ours."""
    for pattern in (_MANIFEST, _SHARD, _TOMBSTONE):
        if match := pattern.fullmatch(key):
            found = Attempt(int(match["step"]), match["attempt"])
            return found if pattern is not _MANIFEST or key == found.manifest else None
    return None


def epoch_of(key: str) -> tuple[Epoch, bool] | None:
    """The epoch a claim or an inheritance belongs to, and whether it is an inheritance; None for other keys."""
    match = _EPOCH.fullmatch(key)
    return (Epoch(int(match["number"]), match["token"]), match["inherited"] is not None) if match else None


def record_of(key: str) -> tuple[Attempt, int] | None:
    """The attempt a note of metrics belongs to, and its number; None for other keys."""
    match = _METRICS.fullmatch(key)
    return (Attempt(int(match["step"]), match["attempt"]), int(match["number"])) if match else None


def pin_of(key: str) -> tuple[Attempt, int | None] | None:
    """The attempt a pin belongs to, and when it ends (seconds since 1970), if it does; None for other keys."""
    match = _PIN.fullmatch(key)
    if match is None:
        return None
    return Attempt(int(match["step"]), match["attempt"]), int(match["until"]) if match["until"] else None


def attempt_beside(key: str) -> Attempt | None:
    """The attempt in whose folder of metrics or pins a key lies, whatever the file is called; None elsewhere."""
    match = _BESIDE.match(key)
    return Attempt(int(match["step"]), match["attempt"]) if match else None


def lineage_of(key: str) -> Attempt | None:
    """The attempt whose origin a note tells; None for other keys."""
    match = _LINEAGE.fullmatch(key)
    return Attempt(int(match["step"]), match["attempt"]) if match else None


def policy_of(key: str) -> Epoch | None:
    """The epoch whose policy a key names; None for other keys."""
    match = _POLICY.fullmatch(key)
    return Epoch(int(match["number"]), match["token"]) if match else None


def rank_of(key: str) -> int | None:
    """The rank that wrote a shard; None for other keys."""
    match = _SHARD.fullmatch(key)
    return int(match["rank"]) if match else None


def writer_of(key: str) -> int | None:
    """The rank that wrote a file of a checkpoint: its shard, or rank 0 the folder of PEFT; None for other keys."""
    return 0 if is_adapter_file(key) else rank_of(key)


def attempt_below(key: str) -> Attempt | None:
    """The attempt in whose data folder a key lies, whatever the file is called; None elsewhere."""
    match = _FOLDER.match(key)
    return Attempt(int(match["step"]), match["attempt"]) if match else None


def is_shard(key: str) -> bool:
    """Whether a key names a shard of ours; nothing else may be read on a manifest's word."""
    return _SHARD.fullmatch(key) is not None


def is_adapter_file(key: str) -> bool:
    """Whether a key names a file of a checkpoint's folder of PEFT; nothing else of it is read on a manifest's word."""
    return _ADAPTER.fullmatch(key) is not None


def is_layout(key: str) -> bool:
    """Whether a key names a layout of ours."""
    return _LAYOUT.fullmatch(key) is not None
