"""A job of one rank whose run root may die before any call: up to where saves begin, and from the commit on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcpsvc.catalog import Catalog
from dcpsvc.config import Options
from dcpsvc.errors import RankFailure
from dcpsvc.events import Events
from dcpsvc.pending import PendingSave
from dcpsvc.retention import Retention
from dcpsvc.save import Save
from dcpsvc.settling import OpenRun, settle
from dcpsvc.stages import discover
from dcpsvc.tiers import Tiers
from tests.unit.turns import MEETING, RUN_ID, Killed, Place, manifest, put_shards, solo

if TYPE_CHECKING:
    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Entry

TOKENS = (f"{number:08x}" for number in range(1, 10**6))


class Mortal(Place):
    """A place at which a job dies before its n-th call from now on."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls_left: int | None = None
        self.writes: list[str] = []

    def _count(self) -> None:
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise Killed

    def create(self, key: str, data: bytes) -> bool:
        self._count()
        self.writes.append(f"create {key}")
        return super().create(key, data)

    def delete(self, key: str) -> None:
        self._count()
        self.writes.append(f"delete {key}")
        super().delete(key)

    def get(self, key: str, *, max_nbytes: int) -> bytes:
        self._count()
        return super().get(key, max_nbytes=max_nbytes)

    def list(self, prefix: str) -> list[Entry]:
        self._count()
        return super().list(prefix)

    def size(self, key: str) -> int:
        self._count()
        return super().size(key)


class OneRank:
    """A start of a job of one rank, up to where saves begin; its commits are put there by hand."""

    def __init__(self, root: Place, disk: Place, **options: Any) -> None:
        self.root, self.disk = root, disk
        job = solo(next(TOKENS))
        path = Path("/disk")
        tiers = Tiers(run_id=RUN_ID, remote=root, local=disk, local_path=path)
        self.settled = settle(job, tiers, MEETING)
        run = OpenRun(run_id=RUN_ID, remote=root, local=disk, local_path=path, settled=self.settled)
        self.catalog = Catalog(
            {attempt.step: attempt for attempt in self.settled.committed}, leftovers=set(self.settled.unfinished)
        )
        self.events: list[str] = []
        events = Events(rank=0, observer=lambda event: self.events.append(str(event)))
        self.retention = Retention(job, run, Options(**options), events, self.catalog)
        self.pauses = job.rendezvous.clock

    def commit(self, step: int, *, created: str = "2026-01-31T23:59:59Z", **metrics: float) -> Attempt:
        """A checkpoint of this job is committed; retention has not run yet."""
        attempt = self.settled.epoch.attempt(step, 0)
        found = replace(manifest(attempt), metrics=metrics, created=created)
        for place in (self.root, self.disk):
            place.put(found.layout.path, b'{"format": 1, "aliases": {}, "tensors": {}}')
            put_shards(place, attempt)
            place.put(attempt.manifest, found.dumps())
        self.catalog.add(found)
        return attempt

    def retain(self, attempt: Attempt) -> list[str]:
        """What comes after a commit; says what was told about it."""
        self.events.clear()
        nothing = RankFailure(0, "stage", "Unfinished", "")
        self.retention.run(Save(key=attempt, pending=PendingSave(*attempt), began=0.0, proposal=nothing))
        return [text for text in self.events if "event=retained" in text]

    def save(self, step: int, **metrics: float) -> list[str]:
        return self.retain(self.commit(step, **metrics))


def started(root: Place | None = None, **options: Any) -> OneRank:
    return OneRank(root or Mortal("root"), Mortal("disk"), **options)


def there(place: Place) -> list[int]:
    return [attempt.step for attempt in discover.committed(place)]
