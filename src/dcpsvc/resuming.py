"""Resuming: the ranks agree on one checkpoint, read and prove all of it, and only then touch the model."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from dcpsvc.errors import (
    CorruptShardError,
    LayoutError,
    ManifestError,
    NoSuchStepError,
    NoValidCheckpointError,
    RankFailure,
    RestoreFailedError,
)
from dcpsvc.format.keys import Attempt
from dcpsvc.ranks.rendezvous import DisagreementError, Meeting
from dcpsvc.stages import discover, restore
from dcpsvc.state import app as states

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from dcpsvc.ranks.job import Job
    from dcpsvc.state.app import AppState
    from dcpsvc.state.saved import Component, Saved, Want
    from dcpsvc.storage.base import Store

T = TypeVar("T")

_DAMAGE = {error.__name__ for error in (ManifestError, LayoutError, CorruptShardError)}
"""Failures that another commit does not share, so an older one is tried."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """What was loaded, and why nothing newer."""

    attempt: Attempt
    summary: str
    rejected: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What one rank has read and proven."""

    reader: restore.CheckpointReader
    components: dict[str, Component]
    saved: Saved
    wants: list[Want]


@dataclass(slots=True)
class Resuming:
    """One resume. Collective; training thread.

    Attributes:
        job: The ranks.
        place: Where they meet about it.
        remote: The run root.
        nearer: Where to look for the files before the run root: the local tier.
        state: Where to load into.
        timeout_s: Longest wait for a peer to arrive.
        work_s: Longest time a rank may take to read.
    """

    job: Job
    place: str
    remote: Store
    nearer: Sequence[Store]
    state: AppState
    timeout_s: float
    work_s: float

    def run(self, step: int | None, skip: Collection[str]) -> Resumed | None:
        """Load the newest valid commit, or exactly ``step``.

        Returns:
            None if nothing was ever committed here.

        Raises:
            NoSuchStepError: ``step`` was named and cannot be loaded.
            NoValidCheckpointError: There are commits and all are damaged.
            RestoreFailedError: A rank cannot take part, or the state does not fit; the same on every rank.
        """
        rejected: list[str] = []
        tried: list[Attempt] = []
        while True:
            verdict = self._meet(f"choose-{len(tried)}", None, functools.partial(self._choose, step, tried))
            rejected += verdict["rejected"]
            if verdict["attempt"] is None:
                self._check_fresh(step, rejected, verdict["all"])
                return None
            attempt = Attempt(*verdict["attempt"])
            try:
                summary = self._load(attempt, skip)
            except RestoreFailedError as err:
                if err.changed or not err.failures or any(failure.error not in _DAMAGE for failure in err.failures):
                    raise
                rejected.append(f"step {attempt.step}: {err.failures[0].text}")
                tried = [*tried, *(Attempt(*pair) for pair in verdict["passed"]), attempt]
            else:
                return Resumed(attempt, summary, tuple(rejected))

    def _within(self, work: Callable[[], T]) -> T:
        return self.job.rendezvous.clock.bounded(work, self.work_s, "reading a checkpoint")

    def _choose(self, step: int | None, tried: Sequence[Attempt], _: object) -> dict[str, Any]:
        """Coordinator: decide for all."""
        choice = self._within(lambda: discover.choose(self.remote, step, tried))
        return {
            "attempt": choice.attempt and list(choice.attempt),
            "rejected": choice.rejected,
            "passed": choice.passed,
            "all": choice.steps,
        }

    def _check_fresh(self, step: int | None, rejected: list[str], everything: list[int]) -> None:
        """Nothing was chosen: fine where nothing was ever committed and nothing was asked for."""
        if step is not None:
            raise NoSuchStepError(self.remote.url, step, tuple(everything), "; ".join(rejected))
        if rejected:
            raise NoValidCheckpointError(self.remote.url, tuple(rejected))

    def _load(self, attempt: Attempt, skip: Collection[str]) -> str:
        """Read and prove on every rank, agree that all could, then change the state."""
        where = f"load-{attempt}"
        loaded: _Loaded | None = None
        try:
            loaded = self._within(lambda: self._read(attempt, skip))
            message = None
        except Exception as err:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            message = RankFailure(self.job.rank, "restore", type(err).__name__, str(err))
        self._meet(f"{where}/read", message, lambda _: None)
        assert loaded is not None  # noqa: S101 - a failure would have ended the meeting
        message = self._apply(loaded)
        self._meet(f"{where}/applied", message, lambda _: None, changed=True)
        return restore.summary(loaded.saved, list(loaded.components), sorted(skip), self.job.world_size)

    def _read(self, attempt: Attempt, skip: Collection[str]) -> _Loaded:
        manifest = discover.read_manifest(self.remote, attempt)
        reader = restore.CheckpointReader(
            manifest, discover.read_layout(self.remote, manifest), [*self.nearer, self.remote]
        )
        saved = reader.saved_for(self.job.rank)
        components = self.state.chosen(saved, skip)
        return _Loaded(reader, components, saved, restore.prepare(reader, states.wants(components, saved)))

    def _apply(self, loaded: _Loaded) -> RankFailure | None:
        try:
            self._within(lambda: restore.finish(loaded.reader, loaded.wants))
            states.apply(loaded.components, loaded.saved, loaded.wants)
        except Exception as err:  # noqa: BLE001 - load_state_dict() is the user's code; the other ranks must hear of it
            return RankFailure(self.job.rank, "apply", type(err).__name__, str(err))
        return None

    def _meet(self, where: str, message: Any, decide: Callable[[list[Any]], Any], *, changed: bool = False) -> Any:
        meeting = Meeting(self.work_s, silence_s=self.timeout_s)
        try:
            return self.job.meet(f"{self.place}/{where}", message, decide, meeting)
        except DisagreementError as err:
            raise RestoreFailedError(self.remote.url, err.failures, err.missing, changed) from None
        except RuntimeError as err:  # the ranks' store does not answer
            failure = RankFailure(self.job.rank, "control", type(err).__name__, str(err))
            raise RestoreFailedError(self.remote.url, (failure,), (), changed) from err
