"""Resuming: the ranks agree on one checkpoint, read and prove all of it, and only then touch the model."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from dcpsvc import choosing, progress, sharing
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
from dcpsvc.format import manifest as manifests
from dcpsvc.format import numbers
from dcpsvc.format.keys import Attempt
from dcpsvc.format.parse import Fields
from dcpsvc.preflight import mebibytes
from dcpsvc.ranks.exchange import Exchange
from dcpsvc.ranks.rendezvous import DisagreementError, Meeting, RefusalError
from dcpsvc.reader import CheckpointReader
from dcpsvc.sharing import Sources
from dcpsvc.stages import discover, restore
from dcpsvc.stages.restore import Ready
from dcpsvc.state import app as states
from dcpsvc.state import fingerprint
from dcpsvc.state.drift import Drift, Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from dcpsvc.choosing import Choice
    from dcpsvc.format.layout import Layout
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.ranks.job import Job
    from dcpsvc.state.app import AppState
    from dcpsvc.state.saved import Component, Saved, Want
    from dcpsvc.storage.base import Store
    from dcpsvc.storage.scatter import Needs

logger = logging.getLogger("dcpsvc")

T = TypeVar("T")

_TOLD_NBYTES = 64 << 10

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


class _Loaded(NamedTuple):
    """What one rank reads."""

    reader: CheckpointReader
    components: dict[str, Component]
    saved: Saved
    wants: list[Want]
    versions: dict[str, str]
    lacking: bool
    ready: Ready = Ready([])
    received_nbytes: int = 0

    @property
    def sources(self) -> Sources:
        """Where its bytes came from."""
        near, far = self.reader.nbytes_read
        return Sources(near, self.received_nbytes, far)


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
    _sharing: bool = False
    _manifest: str = ""
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
            attempt, self._sharing = Attempt(*verdict["attempt"]), verdict["share"]
            self._manifest = verdict["manifest"]
            try:
                summary, versions = self._load(attempt, terms)
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
        """Coordinator: decide for all. What one page cache serves to all ranks, the root gives once as it is."""
        cached = getattr(self.remote, "cached", False) and len({*caches} - {""}) <= 1
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
            "manifest": _told(manifest),
            "share": self.job.world_size > 1 and not cached,
        }

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

    def _load(self, attempt: Attempt, terms: Terms) -> tuple[str, dict[str, str]]:
        """Read and prove on every rank, agree that all could, then change the state."""
        where = f"load-{attempt}"
        if self._sharing:
            loaded, lacking = self._agreed(f"{where}/looked", lambda: self._look(attempt, terms))
            shared = self._shared(where, loaded) if lacking else None
            loaded = shared or self._agreed(f"{where}/read", lambda: self._read(loaded))[0]
        else:
            loaded, _ = self._agreed(f"{where}/read", lambda: self._read(self._look(attempt, terms)))
        message = self._apply(loaded) or loaded.sources
        self._sources = Sources(*self._meet(f"{where}/applied", message, _sum, changed=True))
        summary = restore.summary(loaded.saved, loaded.components, sorted(terms.skip))
        return f"{summary}; read {self._sources}", loaded.versions

    def _agreed(self, where: str, work: Callable[[], _Loaded]) -> tuple[_Loaded, bool]:
        """What this rank's work gives, once all have done theirs, over the base that the checkpoint is for.

        Also whether any of them lacks something near by.
        """
        found: _Loaded | None = None
        message: Any = None
        try:
            found = self._within(work)
            message = {"bases": found.saved.bases, "lacking": found.lacking}
        except Exception as err:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            message = RankFailure(self.job.rank, "restore", type(err).__name__, str(err))
        lacking = self._meet(where, message, lambda said: _checked(found, said))
        assert found is not None  # noqa: S101 - a failure would have ended the meeting
        return found, lacking

    def _look(self, attempt: Attempt, terms: Terms) -> _Loaded:
        """What there is, and what of it this rank wants."""
        told = self._manifest
        found = (
            manifests.loads(attempt.manifest, told.encode()) if told else discover.read_manifest(self.remote, attempt)
        )
        layout = self._layout or discover.read_layout(self.remote, found)
        reader = CheckpointReader(found, layout, [*self.nearer, self.remote], once=self._sharing)
        saved = replace(
            reader.saved_for(self.job.rank),
            ranks=self.job.world_size,
            documents_of=reader.documents,
            terms=terms,
            drift=Drift(attempt.step),
        )
        components = self.state.chosen(saved)
        wants = states.wants(components, saved)
        return _Loaded(reader, components, saved, wants, found.versions, self._sharing and reader.lacks(wants))

    def _read(self, looked: _Loaded) -> _Loaded:
        return self._prepared(looked)

    def _prepared(self, looked: _Loaded, bring: restore.Bring | None = None) -> _Loaded:
        ready = restore.prepare(looked.reader, looked.wants, self.folder, self._watch, bring)
        if ready.why:
            logger.log(
                logging.WARNING if self.folder or self.job.coordinates else logging.DEBUG,
                "rank %s holds %s of the state twice in memory until every rank has proven what it read: %s",
                self.job.rank, mebibytes(ready.held_nbytes), ready.why,
            )  # fmt: skip
        return looked._replace(ready=ready)

    def _shared(self, where: str, looked: _Loaded) -> _Loaded | None:
        """Everything read by all ranks together; None, on all of them, if one could not: they go on by themselves."""
        loaded, why = looked, ""
        try:
            loaded = self._within(lambda: self._share(where, looked))
        except Exception as err:  # noqa: BLE001 - whatever it is: reading alone says whether it can be read at all
            why = f"rank {self.job.rank}: {type(err).__name__}: {err}"
        if reasons := self._meet(f"{where}/shared", why, lambda said: [each for each in said if each]):
            logger.log(
                logging.WARNING if self.job.coordinates else logging.DEBUG,
                "every rank reads the checkpoint by itself: %s", reasons[0],
            )  # fmt: skip
            return None
        return loaded

    def _share(self, where: str, looked: _Loaded) -> _Loaded:
        job, received = self.job, 0

        def bring(needs: dict[int, Needs]) -> None:
            nonlocal received
            namespace = f"{job.incarnation}/{self.place}/{where}"
            exchange = Exchange(rank=job.rank, world_size=job.world_size, namespace=namespace, timeout_s=self.timeout_s)
            received = sharing.together(exchange, job.rank, looked.reader.shards, needs, self._watch)

        return self._prepared(looked, bring)._replace(received_nbytes=received)

    def _watch(self, total_nbytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """One rank tells how far it is, with what all do at the same time."""
        return progress.shown("resuming", total_nbytes, quiet=not self.job.coordinates, say=logger.info)

    def _apply(self, loaded: _Loaded) -> RankFailure | None:
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


def _checked(loaded: _Loaded | None, said: list[Any]) -> bool:
    """Coordinator: an adapter over another base is refused on all ranks; else whether any lacks something."""
    assert loaded is not None  # noqa: S101 - a failure would have ended the meeting
    try:
        fingerprint.check(loaded.saved.step, loaded.versions, [one["bases"] for one in said])
    except StateError as err:
        raise RefusalError([RankFailure(0, "restore", type(err).__name__, str(err))]) from err
    return any(one["lacking"] for one in said)


def _told(found: Manifest | None) -> str:
    """A manifest for all ranks, so that none of them has to fetch it; empty where it is large for the ranks' store."""
    text = found.dumps().decode() if found is not None else ""
    return text if len(text) <= _TOLD_NBYTES else ""


def _sum(sources: list[Any]) -> list[int]:
    return [sum(each) for each in zip(*sources, strict=True)]
