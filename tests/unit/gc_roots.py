"""Run roots with a bit of everything, made by hand, and what must be left of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcpsvc.format import keys, run, sidefiles
from dcpsvc.format.epochs import Claim, Inheritance
from dcpsvc.format.keys import Attempt, Epoch
from dcpsvc.format.manifest import LayoutRef
from dcpsvc.storage.posix import PosixStore
from tests.unit.turns import LAYOUT, RUN_ID, manifest, shard

if TYPE_CHECKING:
    from dcpsvc.storage.base import Store

OLD, NEW = Epoch(1, "aaaaaaaa"), Epoch(2, "bbbbbbbb")
CREATED = "2026-01-31T23:59:59Z"


@dataclass
class Made:
    """A run root, and what lies in it.

    Attributes:
        committed: Whole checkpoints, by step.
        metrics: Their losses, as the latest record says.
        pinned: Steps.
        needs: Of each step the step whose shard it names.
        damaged: Attempts that count and are damaged.
        must_stay: Keys that nothing may remove.
    """

    store: Store
    committed: dict[int, Attempt] = field(default_factory=dict)
    metrics: dict[int, float] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    needs: dict[int, int] = field(default_factory=dict)
    damaged: list[Attempt] = field(default_factory=list)
    must_stay: set[str] = field(default_factory=set)

    def begin(self) -> None:
        """The identity, and two starts of a job."""
        self.put(keys.RUN, run.Run(run_id=RUN_ID, created=CREATED).dumps())
        for epoch in (OLD, NEW):
            self.put(epoch.claim, Claim(epoch=epoch, host="elsewhere", pid=1, created=CREATED).dumps())
        self.put("notes/mine.txt", b"the user's own")
        self.put("data/README", b"the user's own")

    def end(self) -> None:
        """Everything committed so far is inherited."""
        counting = frozenset([*self.committed.values(), *self.damaged])
        self.put(NEW.inheritance, Inheritance(epoch=NEW, attempts=counting).dumps())

    def put(self, key: str, data: bytes) -> None:
        self.store.put(key, data)
        self.must_stay.add(key)

    def commit(
        self, step: int, *, loss: float | None = None, uses: int | None = None, own_layout: bool = False
    ) -> Attempt:
        attempt = OLD.attempt(step, 0)
        layout = LAYOUT + b" " * (step if own_layout else 0)
        records = [shard(attempt, rank)[0] for rank in range(2)]
        for rank in range(2):
            if rank == 1 and uses is not None:
                records[1] = shard(self.committed[uses], 1)[0]
                self.needs[step] = uses
            else:
                self.store.put(*_named(attempt, rank))
        about = replace(
            manifest(attempt, 2),
            shards=tuple(records),
            metrics={} if loss is None else {"loss": loss},
            layout=LayoutRef(digest=keys_digest(layout), nbytes=len(layout)),
        )
        self.store.put(about.layout.path, layout)
        self.store.put(attempt.manifest, about.dumps())
        self.committed[step] = attempt
        if loss is not None:
            self.metrics[step] = loss
        return attempt

    def record(self, step: int, loss: float) -> None:
        attempt = self.committed[step]
        note = sidefiles.Record(attempt=attempt, recorded=CREATED, metrics={"loss": loss})
        self.store.put(attempt.record(1, "11111111"), note.dumps())
        self.metrics[step] = loss

    def pin(self, step: int, until_s: int | None = None) -> None:
        attempt = self.committed[step]
        self.store.put(
            attempt.pin("22222222", until_s), sidefiles.Pin(attempt=attempt, created=CREATED, by="me", note="").dumps()
        )
        if until_s is None:
            self.pinned.add(step)

    def damage(self, step: int, how: str) -> None:
        attempt = self.committed.pop(step)
        self.metrics.pop(step, None)
        self.damaged.append(attempt)
        if how == "manifest":
            self.store.put(attempt.manifest, b"{")
        else:
            self.store.delete(attempt.shard(0))

    def debris(self, step: int, *, fenced: bool = False, marked: bool = False) -> Attempt:
        attempt = OLD.attempt(step, 7)
        self.store.put(*_named(attempt, 0))
        if fenced:
            self.store.put(attempt.manifest, manifest(attempt).dumps())
        if marked:
            self.store.put(attempt.tombstone, b"{}")
        return attempt

    def left(self, kept: set[int]) -> set[str]:
        """Keys of the checkpoints of these steps and of what nothing may remove."""
        found = set(self.must_stay)
        for step in kept:
            attempt = self.committed[step]
            found |= {attempt.manifest, attempt.shard(0), *([] if step in self.needs else [attempt.shard(1)])}
        return found


def keys_digest(data: bytes) -> str:
    from dcpsvc.format import digest

    return digest.digest(data)


def _named(attempt: Attempt, rank: int) -> tuple[str, bytes]:
    record, content = shard(attempt, rank)
    return record.path, content


def a_bit_of_everything(folder: Path) -> Made:
    """Six checkpoints of which ``latest:2,best:1:loss:min`` keeps three and a pin a fourth; debris of every kind."""
    made = Made(PosixStore(folder))
    made.begin()
    for step in range(1, 7):
        made.commit(step, loss=float(step), own_layout=step == 2)
    made.record(3, 0.5)
    made.pin(4)
    made.pin(5, until_s=1000)
    made.store.put(made.committed[2].lineage, b"{}")
    made.store.put(OLD.attempt(77, 0).lineage, b"{}")
    made.debris(2)
    made.debris(8)
    made.debris(1, fenced=True, marked=True)
    made.store.put(made.committed[1].tombstone, b"{}")
    made.store.put(OLD.attempt(78, 0).tombstone, b"{}")
    made.store.put(made.committed[6].shard(9), b"of nobody")
    made.store.put("layouts/" + "ab" * 16 + ".json", b"{}")
    made.store.put("probes/cafe-00000", b"probe")
    (folder / "data" / ".tmp-dead").write_bytes(b"half")
    made.end()
    return made


class Killing:
    """A store whose process dies by SIGKILL around its n-th change."""

    def __init__(self, store: Any, changes: int, *, after: bool) -> None:
        self._store, self._left, self._after = store, changes, after

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)
        return call if name not in {"create", "put", "delete", "remove_unfinished"} else self._counted(call)

    def _counted(self, call: Any) -> Any:
        def counted(*args: Any, **more: Any) -> Any:
            import os
            import signal

            self._left -= 0 if more.get("dry_run") else 1
            if self._left < 0 and not self._after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **more)
            if self._left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted


def main() -> None:
    """Clear a root, and be killed around the n-th change of it: for a process of its own."""
    from dcpsvc.format import policy
    from dcpsvc.tools import clearing
    from dcpsvc.tools.clearrules import Rules

    folder, changes, after = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "after"
    rules = Rules(keep=policy.parse("latest:2,best:1:loss:min"), older_than_s=0.0)
    store: Any = Killing(PosixStore(folder), changes, after=after)
    clearing.clear(store, RUN_ID, rules, clearing.Pace(lambda _: None), take_over=True)


if __name__ == "__main__":
    main()
