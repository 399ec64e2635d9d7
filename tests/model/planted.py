"""Ways to break the protocol, one production function each: the simulation must find every one of them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from dcpsvc import deletions, fence
from dcpsvc.errors import RankFailure, RunBusyError
from dcpsvc.format.keys import EPOCHS, epoch_of
from dcpsvc.life import Life
from dcpsvc.ranks.rendezvous import DisagreementError, Meeting, Rendezvous
from dcpsvc.save import Save
from dcpsvc.stages import ack, commit, retain
from dcpsvc.storage import wholefile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dcpsvc.format.adapter import AdapterFile
    from dcpsvc.format.epochs import Claim
    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.storage.base import Store

_acknowledge = ack.acknowledge
_claim = fence.claim
_condemn = retain.condemn
_upload = Life._upload  # pyright: ignore[reportPrivateUsage]


def _without_acks(job: Any, place: str, phase: str, mine: Any, meeting: Meeting, **more: Any) -> ack.Acks:
    """The second acknowledgement is taken for granted, whatever became of the upload."""
    failed_before = isinstance(mine, RankFailure) and mine.phase != "upload"
    if phase == "remote" and not failed_before:
        return ack.Acks([], [])
    return _acknowledge(job, place, phase, mine, meeting, **more)


def _manifest_first(self: Life, save: Save, manifest: Any, layout: Any) -> Any:
    """The manifest is written, then the data is uploaded."""
    if self._job.coordinates:
        commit.create(self._run.remote, manifest)
    return _upload(self, save, manifest, layout)


def _one_place(self: Save) -> str:
    """Meetings of every save have the same keys."""
    return "save"


def _raising_ack(job: Any, place: str, phase: str, mine: Any, meeting: Meeting, **more: Any) -> ack.Acks:
    """A failure is raised where it happened, and its rank does not come to the meeting."""
    if isinstance(mine, RankFailure):
        raise RuntimeError(mine.text)  # noqa: TRY004
    return _acknowledge(job, place, phase, mine, meeting, **more)


def _data_first(store: Store, attempt: Attempt, pace: retain.Pace = retain.FLAT_OUT) -> bool:
    """Retention deletes the data, then the manifest."""
    retain.remove_data(store, attempt, pace)
    store.delete(attempt.manifest)
    store.delete(attempt.tombstone)
    return True


_read_verdict = Rendezvous._read_verdict  # pyright: ignore[reportPrivateUsage]


def _own_decision(self: Rendezvous, place: str, where: str, meeting: Meeting, began: float) -> Any:
    """A rank that has waited long enough decides that the others are missing, and asks nobody."""
    ends = self.clock.now() + 0.5 * meeting.timeout_s
    while self.store.get(f"{place}/verdict") is None:
        if self.clock.now() >= ends:
            raise DisagreementError(where.rsplit("/", 1)[-1], [], [0], self.world_size, 0.0)
        self.clock.sleep(0.02)
    return _read_verdict(self, place, where, meeting, began)


def _unconfirmed(store: Store, manifest: Manifest, within: Any) -> commit.Published:
    """Nobody looks for a newer job once the manifest is written."""
    return commit.Published("", "")


def _unasked(store: Store, attempt: Attempt, owned: Callable[[], bool]) -> bool:
    """A deletion goes on, whoever owns the run root by now."""
    _condemn(store, attempt, owned)
    return True


def _blind(store: Store) -> list[Attempt]:
    """A new job does not see what an older one is deleting, and finishes its upload."""
    return []


def _any_inheritance(store: Store, attempt: Attempt) -> fence.Verdict:
    """While the newest job has not said what it inherits, the one before decides."""
    newest = fence.newest_inheritance(store, store.list(EPOCHS))
    theirs = fence.successor(store, attempt.epoch)
    return fence.Verdict(counts=newest is None or newest.counts(attempt), theirs=theirs)


def _nobody_wins(store: Store, make: Callable[[int], Claim]) -> Claim:
    """Of jobs that claim the same number at once all are refused, not all but one."""
    mine = _claim(store, make)
    named = (epoch_of(entry.key) for entry in store.list(EPOCHS))
    if len({one[0].token for one in named if one and one[0].number == mine.epoch.number}) > 1:
        raise RunBusyError(store.url, "another job claims it, too")
    return mine


def _left_here(store: Store, file: AdapterFile, path: Path) -> None:
    """The folder of PEFT stays on the disk of the node, whatever the manifest says."""


BUGS: dict[str, tuple[Any, str, Any]] = {
    "commit without acks": (ack, "acknowledge", _without_acks),
    "manifest before data": (Life, "_upload", _manifest_first),
    "stale barrier key": (Save, "place", property(_one_place)),
    "ack as an exception": (ack, "acknowledge", _raising_ack),
    "data deleted before the manifest": (retain, "finish_removal", _data_first),
    "commit without its folder": (wholefile, "put", _left_here),
    "one rank decides on its own": (Rendezvous, "_read_verdict", _own_decision),
}

BUGS_OF_TWO_JOBS: dict[str, tuple[Any, str, Any]] = {
    "commit without a second look": (commit, "_confirm", _unconfirmed),
    "deletion without a look": (retain, "condemn", _unasked),
    "tombstones not seen": (deletions, "condemned", _blind),
    "any inheritance decides": (fence, "verdict", _any_inheritance),
    "nobody wins": (fence, "claim", _nobody_wins),
}
"""Found where an older job is held up and a newer one meets it: where there is a plot."""


@contextlib.contextmanager
def planted(bug: str) -> Iterator[None]:
    """With a bug in the protocol."""
    owner, name, wrong = (BUGS | BUGS_OF_TWO_JOBS)[bug]
    right = vars(owner)[name]
    setattr(owner, name, wrong)
    try:
        yield
    finally:
        setattr(owner, name, right)
