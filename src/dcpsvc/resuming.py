"""Resuming: the ranks agree on one checkpoint, read and prove all of it, and only then touch the model."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
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
from dcpsvc.format import numbers
from dcpsvc.format.keys import Attempt
from dcpsvc.format.parse import Fields
from dcpsvc.ranks.rendezvous import DisagreementError, Meeting
from dcpsvc.reader import CheckpointReader
from dcpsvc.stages import discover, restore
from dcpsvc.state import app as states
from dcpsvc.state.drift import Drift, Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dcpsvc.ranks.job import Job
    from dcpsvc.state.app import AppState
    from dcpsvc.state.saved import Component, Saved, Want
    from dcpsvc.storage.base import Store

T = TypeVar("T")

_DAMAGE = {error.__name__ for error in (ManifestError, LayoutError, CorruptShardError)}
"""Failures that another commit does not share, so an older one is tried."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """What was loaded, and why nothing newer.

    Attributes:
        attempt: The checkpoint.
        summary: What was loaded and what was left out, for people.
        versions: What it says about its origin.
        rejected: Why nothing newer, a line for each.
        metrics: As the manifest has them.
    """

    attempt: Attempt
    summary: str
    versions: dict[str, str]
    rejected: tuple[str, ...]
    metrics: dict[str, float] = field(default_factory=dict[str, float])


def _no_hold(attempt: Attempt) -> None:
    """For whoever knows that nobody deletes."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What one rank has read and proven."""

    reader: CheckpointReader
    components: dict[str, Component]
    saved: Saved
    wants: list[Want]
    versions: dict[str, str]


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
        hold: Called on the coordinator with each checkpoint before it is read, so that nobody deletes it meanwhile.
        even_diverged: Take one that is tagged as diverged, too.
    """

    job: Job
    place: str
    remote: Store
    nearer: Sequence[Store]
    state: AppState
    timeout_s: float
    work_s: float
    hold: Callable[[Attempt], None] = _no_hold
    even_diverged: bool = False

    def run(self, step: int | None, terms: Terms) -> Resumed | None:
        """Load the newest valid commit, or exactly ``step``, on the terms of the user.

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
                summary, versions = self._load(attempt, terms)
            except RestoreFailedError as err:
                if err.changed or not err.failures or any(failure.error not in _DAMAGE for failure in err.failures):
                    raise
                rejected.append(f"step {attempt.step}: {err.failures[0].text}")
                tried = [*tried, *(Attempt(*pair) for pair in verdict["passed"]), attempt]
            else:
                metrics = numbers.load(Fields(attempt.manifest, verdict["metrics"], ManifestError))
                return Resumed(attempt, summary, versions, tuple(rejected), metrics)

    def _within(self, work: Callable[[], T]) -> T:
        return self.job.rendezvous.clock.bounded(work, self.work_s, "reading a checkpoint")

    def _choose(self, step: int | None, tried: Sequence[Attempt], _: object) -> dict[str, Any]:
        """Coordinator: decide for all."""
        choice = self._within(lambda: self._find(step, tried))
        return {
            "attempt": choice.found and list(choice.found.key),
            "metrics": choice.found and numbers.dump(choice.found.metrics),
            "rejected": choice.rejected,
            "passed": choice.passed,
            "all": choice.steps,
        }

    def _find(self, step: int | None, tried: Sequence[Attempt]) -> discover.Choice:
        choice = discover.choose(self.remote, step, tried, even_diverged=self.even_diverged)
        if choice.found is not None:
            self.hold(choice.found.key)
        return choice

    def _check_fresh(self, step: int | None, rejected: list[str], everything: list[int]) -> None:
        """Nothing was chosen: fine where nothing was ever committed and nothing was asked for."""
        if step is not None:
            raise NoSuchStepError(self.remote.url, step, tuple(everything), "; ".join(rejected))
        if rejected:
            raise NoValidCheckpointError(self.remote.url, tuple(rejected))

    def _load(self, attempt: Attempt, terms: Terms) -> tuple[str, dict[str, str]]:
        """Read and prove on every rank, agree that all could, then change the state."""
        where = f"load-{attempt}"
        loaded: _Loaded | None = None
        try:
            loaded = self._within(lambda: self._read(attempt, terms))
            message = None
        except Exception as err:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            message = RankFailure(self.job.rank, "restore", type(err).__name__, str(err))
        self._meet(f"{where}/read", message, lambda _: None)
        assert loaded is not None  # noqa: S101 - a failure would have ended the meeting
        message = self._apply(loaded)
        self._meet(f"{where}/applied", message, lambda _: None, changed=True)
        summary = restore.summary(loaded.saved, list(loaded.components), sorted(terms.skip), self.job.world_size)
        return summary, loaded.versions

    def _read(self, attempt: Attempt, terms: Terms) -> _Loaded:
        manifest = discover.read_manifest(self.remote, attempt)
        reader = CheckpointReader(manifest, discover.read_layout(self.remote, manifest), [*self.nearer, self.remote])
        saved = replace(
            reader.saved_for(self.job.rank), documents_of=reader.documents, terms=terms, drift=Drift(attempt.step)
        )
        components = self.state.chosen(saved)
        wants = restore.prepare(reader, states.wants(components, saved))
        return _Loaded(reader, components, saved, wants, manifest.versions)

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
