"""The manifest: the commit record. A checkpoint exists exactly when its manifest parses and validates."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from dcpsvc.errors import ManifestError
from dcpsvc.format import keys, numbers
from dcpsvc.format.adapter import AdapterFolder
from dcpsvc.format.digest import BLOCK_NBYTES, table_nbytes
from dcpsvc.format.parse import Fields
from dcpsvc.format.seal import check_seal, seal

FORMAT = 1
"""Version of every file in a run root."""

MAX_NBYTES = 64 << 20
"""Largest manifest worth reading: 64 MiB holds 400,000 ranks."""

MAX_SHARD_NBYTES = 1 << 50
MAX_RANKS = 1 << 20

_DIGEST = re.compile(r"[0-9a-f]{32}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """What one rank says about its shard.

    Attributes:
        rank: Global rank that wrote it.
        path: Run-relative key of the file.
        nbytes: Size of the whole file.
        body_nbytes: Bytes covered by the block table; the table follows them.
        digest: XXH3-128 of the block table, so of every byte before it.
    """

    rank: int
    path: str
    nbytes: int
    body_nbytes: int
    digest: str

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest, and as it travels in the all_gather."""
        return {
            "rank": self.rank,
            "path": self.path,
            "nbytes": self.nbytes,
            "body_nbytes": self.body_nbytes,
            "digest": self.digest,
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> ShardRecord:
        """Validate one entry: a name of ours, sizes that fit each other."""
        record = cls(
            rank=fields.count("rank", MAX_RANKS),
            path=fields.text("path", keys.is_shard),
            nbytes=fields.count("nbytes", MAX_SHARD_NBYTES),
            body_nbytes=fields.count("body_nbytes", MAX_SHARD_NBYTES),
            digest=fields.text("digest", _DIGEST.fullmatch),
        )
        if record.nbytes != record.body_nbytes + table_nbytes(record.body_nbytes):
            raise fields.fail(f"{record.path}: {record.nbytes} bytes cannot hold {record.body_nbytes} and their table")
        return record


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRef:
    """Which layout the shards of a checkpoint follow."""

    digest: str
    nbytes: int

    @property
    def path(self) -> str:
        """Run-relative key of the layout."""
        return keys.layout(self.digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One checkpoint.

    Attributes:
        run_id: The run root's identity.
        step: Training step of the saved state.
        attempt: Names the save that wrote these shards; a retry gets a new one.
        created: UTC time of the commit, ISO 8601 with ``Z``.
        shards: One record a rank, in rank order, so ``len(shards)`` is the world size.
        layout: Where every tensor lies in the shards.
        adapter: Its folder of PEFT; None if none was asked for.
        metrics: Numbers given with the save; finite, or as the strings ``nan``, ``inf``, ``-inf``.
        versions: Of dcpsvc, torch and python.
    """

    run_id: str
    step: int
    attempt: str
    created: str
    shards: tuple[ShardRecord, ...]
    layout: LayoutRef
    adapter: AdapterFolder | None = None
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    versions: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def key(self) -> keys.Attempt:
        """Step and attempt."""
        return keys.Attempt(self.step, self.attempt)

    @property
    def world_size(self) -> int:
        """Ranks that wrote it."""
        return len(self.shards)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, and of the folder of PEFT."""
        return sum(shard.nbytes for shard in self.shards) + (self.adapter.nbytes if self.adapter else 0)

    @property
    def sizes(self) -> dict[str, int]:
        """Of every file of its own, by key: all but the layout, which others share."""
        shards = {shard.path: shard.nbytes for shard in self.shards}
        return shards | ({file.path: file.nbytes for file in self.adapter.files} if self.adapter else {})

    def dumps(self) -> bytes:
        """The file's content."""
        return seal(
            {
                "format": FORMAT,
                "run_id": self.run_id,
                "step": self.step,
                "attempt": self.attempt,
                "created": self.created,
                "world_size": self.world_size,
                "block_nbytes": BLOCK_NBYTES,
                "layout": {"digest": self.layout.digest, "nbytes": self.layout.nbytes},
                "adapter": None if self.adapter is None else self.adapter.to_json(),
                "metrics": numbers.dump(self.metrics),
                "versions": self.versions,
                "shards": [shard.to_json() for shard in self.shards],
            }
        )


def loads(path: str, data: bytes) -> Manifest:
    """Parse and validate a manifest read from the key ``path``.

    Raises:
        ManifestError: It is not valid JSON, lacks a field, is of another format version, names a file
            that is not ours, or does not carry the step and attempt its own name says.
    """
    fields = Fields.parse(path, data, ManifestError)
    if (version := fields.get("format", int)) != FORMAT:
        raise fields.fail(f"format version {version}, this package reads {FORMAT}")
    if (block := fields.get("block_nbytes", int)) != BLOCK_NBYTES:
        raise fields.fail(f"block size {block}, this package reads {BLOCK_NBYTES}")
    check_seal(fields)
    layout = fields.child("layout")
    manifest = Manifest(
        run_id=fields.text("run_id", bool),
        step=fields.count("step", keys.MAX_STEP),
        attempt=fields.get("attempt", str),
        created=fields.text("created", _is_time),
        shards=tuple(ShardRecord.from_fields(shard) for shard in fields.children("shards")),
        layout=LayoutRef(digest=layout.text("digest", _DIGEST.fullmatch), nbytes=layout.count("nbytes", 1 << 40)),
        adapter=AdapterFolder.from_fields(adapter) if (adapter := fields.child_or_null("adapter")) else None,
        metrics=numbers.load(fields.child("metrics")),
        versions={name: str(value) for name, value in fields.child("versions").items()},
    )
    _check(fields, path, manifest)
    return manifest


def _check(fields: Fields, path: str, manifest: Manifest) -> None:
    if keys.attempt_of(path) != manifest.key:
        raise fields.fail(f"its content says {manifest.key}")
    if [shard.rank for shard in manifest.shards] != list(range(fields.count("world_size", MAX_RANKS))):
        raise fields.fail(f"shards are not one for each of {fields.get('world_size', int)} ranks, in order")
    if not manifest.shards:
        raise fields.fail("no shards")
    if manifest.adapter and not all(file.path.startswith(manifest.key.adapter) for file in manifest.adapter.files):
        raise fields.fail("its adapter folder is another checkpoint's")


def _is_time(text: str) -> bool:
    if not _TIME.fullmatch(text):
        return False
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
