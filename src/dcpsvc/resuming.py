"""Resuming: the ranks agree on one checkpoint, read and prove all of it, and only then touch the model."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from dcpsvc import choosing
from dcpsvc.errors import (
    CorruptShardError,
    LayoutError,
    ManifestError,
    NoSuchStepError,
    NoValidCheckpointError,
    RankFailure,
    RestoreFailedError,
    StateError,
    StepDeletedError,
)
from dcpsvc.format import numbers
from dcpsvc.format.keys import Attempt
from dcpsvc.format.parse import Fields
from dcpsvc.intake import Chosen, Intake, told
from dcpsvc.ranks.rendezvous import DisagreementError, Meeting, RefusalError
from dcpsvc.stages import restore
from dcpsvc.state import app as states
from dcpsvc.state import fingerprint
from dcpsvc.together import Sources

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    from dcpsvc.choosing import Choice
    from dcpsvc.format.layout import Layout
    from dcpsvc.intake import Taken
    from dcpsvc.ranks.job import Job
    from dcpsvc.state.app import AppState
    from dcpsvc.state.drift import Drift, Terms
    from dcpsvc.storage.base import Store

logger = logging.getLogger("dcpsvc")

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
        sources: Where the bytes came from, all ranks together.
    """

    attempt: Attempt
    summary: str
    versions: dict[str, str]
    rejected: tuple[str, ...]
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    sources: Sources = field(default_factory=Sources)


def _no_hold(attempt: Attempt) -> None:
    """For whoever knows that nobody deletes."""


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
        deleted: Attempts that the coordinator knows to have been deleted lately.
        folder: On a disk of this node, for what may not be in the state yet; None: it waits in memory.
        read_together: Whether the ranks get from each other what several need; None: it depends on what the run root
            is. The coordinator's counts.
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
    deleted: Collection[Attempt] = ()
    folder: Path | None = None
    read_together: bool | None = None
    _layout: Layout | None = None
    _sources: Sources = field(default_factory=Sources)

    def run(self, step: int | None, terms: Terms) -> Resumed | None:
        """Load the newest valid commit, or exactly ``step``, on the terms of the user.

        Returns:
            None if nothing was ever committed here.

        Raises:
            NoSuchStepError: ``step`` was named and cannot be loaded.
            StepDeletedError: It is being deleted, or was meanwhile.
            NoValidCheckpointError: There are commits and all are damaged.
            RestoreFailedError: A rank cannot take part, or the state does not fit; the same on every rank.
        """
        rejected: list[str] = []
        tried: list[Attempt] = []
        while True:
            verdict = self._meet(
                f"choose-{len(tried)}", self._page_cache(), functools.partial(self._choose, step, tried)
            )
            rejected += verdict["rejected"]
            if verdict["attempt"] is None:
                self._check_fresh(step, rejected, verdict)
                return None
            attempt = Attempt(*verdict["attempt"])
            chosen = Chosen(attempt, verdict["manifest"], self._layout, verdict["together"])
            try:
                summary, versions = self._load(chosen, terms)
            except RestoreFailedError as err:
                if err.changed or not err.failures or any(failure.error not in _DAMAGE for failure in err.failures):
                    raise
                rejected.append(f"step {attempt.step}: {err.failures[0].text}")
                tried = [*tried, *(Attempt(*pair) for pair in verdict["passed"]), attempt]
            else:
                metrics = numbers.load(Fields(attempt.manifest, verdict["metrics"], ManifestError))
                return Resumed(attempt, summary, versions, tuple(rejected), metrics, self._sources)

    def _within(self, work: Callable[[], T]) -> T:
        return self.job.rendezvous.clock.bounded(work, self.work_s, "reading a checkpoint")

    def _page_cache(self) -> str:
        """Whose memory this rank has a directory from; empty where it has none, or does not answer."""
        bounded, asked_s = self.job.rendezvous.clock.bounded, self.timeout_s / 2
        try:
            return bounded(lambda: str(getattr(self.remote, "page_cache", "")), asked_s, "looking at the run root")
        except TimeoutError:
            return ""

    def _choose(self, step: int | None, tried: Sequence[Attempt], caches: list[str]) -> dict[str, Any]:
        """Coordinator: decide for all."""
        choice = self._within(lambda: self._find(step, tried))
        manifest = choice.found and choice.found.manifest
        self._layout = choice.found and choice.found.layout
        return {
            "attempt": manifest and list(manifest.key),
            "metrics": manifest and numbers.dump(manifest.metrics),
            "rejected": choice.rejected,
            "passed": choice.passed,
            "all": choice.steps,
            "deleted": choice.deleted and choice.deleted.args[3:],
            "manifest": told(manifest),
            "together": self.job.world_size > 1 and self._together(caches),
        }

    def _together(self, caches: list[str]) -> bool:
        """Coordinator. What one page cache serves to all ranks, the root gives once as it is."""
        if self.read_together is not None:
            return self.read_together
        return not getattr(self.remote, "cached", False) or len({*caches} - {""}) > 1

    def _find(self, step: int | None, tried: Sequence[Attempt]) -> Choice:
        choice = choosing.choose(self.remote, step, tried, even_diverged=self.even_diverged, deleted=self.deleted)
        if choice.found is not None:
            self.hold(choice.found.manifest.key)
        return choice

    def _check_fresh(self, step: int | None, rejected: list[str], verdict: dict[str, Any]) -> None:
        """Nothing was chosen: fine where nothing was ever committed and nothing was asked for."""
        if step is not None and verdict["deleted"]:
            raise StepDeletedError(self.remote.url, step, tuple(verdict["all"]), *verdict["deleted"])
        if step is not None:
            raise NoSuchStepError(self.remote.url, step, tuple(verdict["all"]), "; ".join(rejected))
        if rejected:
            raise NoValidCheckpointError(self.remote.url, tuple(rejected))

    def _load(self, chosen: Chosen, terms: Terms) -> tuple[str, dict[str, str]]:
        """Read and prove on every rank, agree that all could, then change the state."""
        where = f"load-{chosen.attempt}"
        intake = Intake(self.job, [*self.nearer, self.remote], self.state, self.folder)
        if chosen.together:
            loaded, lacking = self._agreed(f"{where}/looked", lambda: intake.look(chosen, terms))
            brought = self._brought(where, intake, loaded) if lacking else None
            loaded = brought or self._agreed(f"{where}/read", lambda: intake.read(loaded))[0]
        else:
            loaded, _ = self._agreed(f"{where}/read", lambda: intake.read(intake.look(chosen, terms)))
        self._tell(loaded.saved.drift)
        message = self._apply(loaded) or loaded.sources
        self._sources = Sources(*self._meet(f"{where}/applied", message, _sum, changed=True))
        summary = restore.summary(loaded.saved, loaded.components, sorted(terms.skip))
        return f"{summary}; read {self._sources}", loaded.versions

    def _tell(self, drift: Drift) -> None:
        """What is about to be left as it is, or unused; of parts of a model by each holder."""
        if told := drift.summary():
            logger.log(
                logging.WARNING if self.job.coordinates or drift.own else logging.DEBUG,
                "step %s, rank %s: the state and the checkpoint differ: %s\n%s",
                drift.step, self.job.rank, told, drift.table(),
            )  # fmt: skip

    def _agreed(self, where: str, work: Callable[[], Taken]) -> tuple[Taken, bool]:
        """What this rank's work gives, once all have done theirs, over the base that the checkpoint is for.

        Also whether any of them lacks something near by.
        """
        found: Taken | None = None
        message: Any = None
        try:
            found = self._within(work)
            message = {"bases": found.saved.bases, "lacking": found.lacking}
        except Exception as err:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            message = RankFailure(self.job.rank, "restore", type(err).__name__, str(err))
        lacking = self._meet(where, message, lambda said: _checked(found, said))
        assert found is not None  # noqa: S101 - a failure would have ended the meeting
        return found, lacking

    def _brought(self, where: str, intake: Intake, looked: Taken) -> Taken | None:
        """Everything read by all ranks together; None, on all of them, if one could not: they go on by themselves."""
        loaded, why = looked, ""
        try:
            loaded = self._within(lambda: intake.read_together(looked, f"{self.place}/{where}", self.timeout_s))
        except Exception as err:  # noqa: BLE001 - whatever it is: reading alone says whether it can be read at all
            why = f"rank {self.job.rank}: {type(err).__name__}: {err}"
        if reasons := self._meet(f"{where}/together", why, lambda said: [each for each in said if each]):
            logger.log(
                logging.WARNING if self.job.coordinates else logging.DEBUG,
                "every rank reads the checkpoint by itself: %s", reasons[0],
            )  # fmt: skip
            return None
        return loaded

    def _apply(self, loaded: Taken) -> RankFailure | None:
        try:
            self._within(lambda: restore.finish(loaded.reader, loaded.ready))
            states.apply(loaded.components, loaded.saved, loaded.ready.wants)
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


def _checked(loaded: Taken | None, said: list[Any]) -> bool:
    """Coordinator: an adapter over another base is refused on all ranks; else whether any lacks something."""
    assert loaded is not None  # noqa: S101 - a failure would have ended the meeting
    try:
        fingerprint.check(loaded.saved.step, loaded.versions, [one["bases"] for one in said])
    except StateError as err:
        raise RefusalError([RankFailure(0, "restore", type(err).__name__, str(err))]) from err
    return any(one["lacking"] for one in said)


def _sum(sources: list[Any]) -> list[int]:
    return [sum(each) for each in zip(*sources, strict=True)]
