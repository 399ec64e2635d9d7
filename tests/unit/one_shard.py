"""A shard of four blocks, and stores that hold it."""

from __future__ import annotations

import json
import random

from dcpsvc.errors import StoreUnavailableError
from dcpsvc.format import digest, shardfile
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.format.keys import Attempt
from dcpsvc.format.manifest import ShardRecord
from dcpsvc.format.shardfile import Piece
from dcpsvc.storage.memory import MemoryStore

KEY = Attempt(7, "cafe-0").shard(0)
DOCUMENTS = {"sched": {"last_epoch": 7}, "rng@0": [1, 2, 3]}


def make_shard(numel: int, key: str = KEY, data: bytes | None = None) -> tuple[bytes, ShardRecord]:
    """A file of one tensor, and its record; the step in the header is that of the key."""
    placement = shardfile.place([Piece("w", "U8", (numel,), (0,), (numel,))])
    objects = json.dumps(DOCUMENTS).encode()
    head = shardfile.header(placement, len(objects), {"path": key})
    body = head + (random.Random(0).randbytes(numel) if data is None else data) + objects
    table = digest.table(memoryview(body))
    content = body + table
    record = ShardRecord(rank=0, path=key, nbytes=len(content), body_nbytes=len(body), digest=digest.digest(table))
    return content, record


CONTENT, RECORD = make_shard(3 * BLOCK_NBYTES + 12_345)
BODY = CONTENT[: RECORD.body_nbytes]


class CountingStore(MemoryStore):
    """Counts the bytes it gives out."""

    given_out = 0

    def read(self, key: str, begin: int, end: int) -> bytes:
        self.given_out += end - begin
        return super().read(key, begin, end)


class SilentStore(MemoryStore):
    """Does not answer."""

    def size(self, key: str) -> int:
        raise StoreUnavailableError("size", key, "timed out")


def stored(
    content: bytes | None = CONTENT, kind: type[MemoryStore] = MemoryStore, *, name: str = "near"
) -> MemoryStore:
    """A store that holds ``content`` as the shard; one name at a time, because memory outlives its stores."""
    store = kind(f"verified-shard-{name}")
    store.delete(KEY)
    if content is not None:
        store.put(KEY, content)
    return store


def flipped(at: int, flip: int = 1) -> bytes:
    return CONTENT[:at] + bytes([CONTENT[at] ^ flip]) + CONTENT[at + 1 :]


INTACT = stored(name="intact")
