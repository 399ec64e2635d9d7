"""A manifest of two shards, to be damaged in every way."""

from __future__ import annotations

import json
import math
from typing import Any

from dcpsvc.format import manifest
from dcpsvc.format.digest import table_nbytes
from dcpsvc.format.keys import Attempt
from dcpsvc.format.manifest import LayoutRef, Manifest, ShardRecord


def record(attempt: Attempt, rank: int, *, body_nbytes: int = 5000, digest: str = "ab" * 16) -> ShardRecord:
    nbytes = body_nbytes + table_nbytes(body_nbytes)
    return ShardRecord(rank=rank, path=attempt.shard(rank), nbytes=nbytes, body_nbytes=body_nbytes, digest=digest)


SMALL = Manifest(
    run_id="r1",
    step=7,
    attempt="cafe-0",
    created="2026-01-31T23:59:59Z",
    shards=tuple(record(Attempt(7, "cafe-0"), rank) for rank in range(2)),
    layout=LayoutRef(digest="01" * 16, nbytes=99),
    metrics={"loss": 0.5, "grad": math.inf},
    versions={"torch": "2.11"},
)
PATH = SMALL.key.manifest


def content() -> dict[str, Any]:
    """The fields of the small manifest, without its seal."""
    fields = json.loads(SMALL.dumps())
    del fields["digest"]
    return fields


def parsed(change: dict[str, Any] | None = None, shard: dict[str, Any] | None = None) -> Manifest:
    """What comes of the small manifest, sealed anew, with some of its fields, or of its second shard's, replaced."""
    fields = content() | (change or {})
    if shard:
        fields["shards"][1] |= shard
    return manifest.loads(PATH, manifest.seal(fields))
