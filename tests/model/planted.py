"""Six ways to break the protocol, one production function each: the simulation must find every one of them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import RankFailure
from dcpsvc.life import Life
from dcpsvc.ranks.rendezvous import DisagreementError, Meeting, Rendezvous
from dcpsvc.save import Save
from dcpsvc.stages import ack, commit, retain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Store

_acknowledge = ack.acknowledge
_upload = Life._upload  # pyright: ignore[reportPrivateUsage]


def _without_acks(job: Any, place: str, phase: str, mine: Any, meeting: Meeting) -> list[Any]:
    """The second acknowledgement is taken for granted, whatever became of the upload."""
    failed_before = isinstance(mine, RankFailure) and mine.phase != "upload"
    return [] if phase == "remote" and not failed_before else _acknowledge(job, place, phase, mine, meeting)


def _manifest_first(self: Life, save: Save, manifest: Any, layout: Any) -> Any:
    """The manifest is written, then the data is uploaded."""
    if self._job.coordinates:
        commit.create(self._run.remote, manifest)
    return _upload(self, save, manifest, layout)


def _one_place(self: Save) -> str:
    """Meetings of every save have the same keys."""
    return "save"


def _raising_ack(job: Any, place: str, phase: str, mine: Any, meeting: Meeting) -> list[Any]:
    """A failure is raised where it happened, and its rank does not come to the meeting."""
    if isinstance(mine, RankFailure):
        raise RuntimeError(mine.text)  # noqa: TRY004
    return _acknowledge(job, place, phase, mine, meeting)


def _data_first(store: Store, attempt: Attempt) -> None:
    """Retention deletes the data, then the manifest."""
    retain.remove_data(store, attempt)
    store.delete(attempt.manifest)
    store.delete(attempt.tombstone)


_read_verdict = Rendezvous._read_verdict  # pyright: ignore[reportPrivateUsage]


def _own_decision(self: Rendezvous, place: str, where: str, meeting: Meeting, began: float) -> Any:
    """A rank that has waited long enough decides that the others are missing, and asks nobody."""
    ends = self.clock.now() + 0.5 * meeting.timeout_s
    while self.store.get(f"{place}/verdict") is None:
        if self.clock.now() >= ends:
            raise DisagreementError(where.rsplit("/", 1)[-1], [], [0], self.world_size, 0.0)
        self.clock.sleep(0.02)
    return _read_verdict(self, place, where, meeting, began)


BUGS: dict[str, tuple[Any, str, Any]] = {
    "commit without acks": (ack, "acknowledge", _without_acks),
    "manifest before data": (Life, "_upload", _manifest_first),
    "stale barrier key": (Save, "place", property(_one_place)),
    "ack as an exception": (ack, "acknowledge", _raising_ack),
    "data deleted before the manifest": (retain, "finish_removal", _data_first),
    "one rank decides on its own": (Rendezvous, "_read_verdict", _own_decision),
}


@contextlib.contextmanager
def planted(bug: str) -> Iterator[None]:
    """With a bug in the protocol."""
    owner, name, wrong = BUGS[bug]
    right = vars(owner)[name]
    setattr(owner, name, wrong)
    try:
        yield
    finally:
        setattr(owner, name, right)
