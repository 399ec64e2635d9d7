"""The life of one checkpoint, in order, on the uploader thread.

stage (by the training thread) -> plan -> shard -> adapter (if asked for) -> ack -> upload -> ack -> commit -> retain.
A failure on this rank becomes a value that is brought to the next meeting, so every rank hears of it; what the
meeting says is the same error on every rank.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from dcpsvc import outcomes
from dcpsvc.blueprint import Layouts
from dcpsvc.carrying import Carrier
from dcpsvc.contribution import Contribution
from dcpsvc.errors import (
    ClosedError,
    CommitUnknownError,
    FencedError,
    RankFailure,
    RanksMissingError,
    RootError,
    SaveError,
    SaveSkippedError,
)
from dcpsvc.events import Point
from dcpsvc.format.digest import digest
from dcpsvc.format.manifest import LayoutRef, Manifest, ShardRecord
from dcpsvc.lateness import OWN, slowest
from dcpsvc.preflight import DiskNeed, Size
from dcpsvc.ranks.rendezvous import DisagreementError, Meeting
from dcpsvc.retention import Retention
from dcpsvc.stages import ack, adapter, commit, upload
from dcpsvc.state.claims import Digests

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.catalog import Catalog
    from dcpsvc.config import Options
    from dcpsvc.events import Events
    from dcpsvc.format.adapter import AdapterFolder
    from dcpsvc.format.parts import Part
    from dcpsvc.ranks.job import Job
    from dcpsvc.save import Save
    from dcpsvc.settling import OpenRun

T = TypeVar("T")
_Record = ShardRecord | RankFailure


class Life:
    """Runs saves one after the other; owned by the uploader thread."""

    def __init__(self, job: Job, run: OpenRun, options: Options, events: Events, catalog: Catalog) -> None:
        self._job, self._run, self._options, self._events = job, run, options, events
        self._retention = Retention(job, run, options, events, catalog)
        self.catalog, self._layouts, self._said = catalog, Layouts(), Digests()
        self.abandoned = threading.Event()
        self._mine = Contribution(job.rank, self.abandoned)
        self._previous: Save | None = None
        self._carrier, self._replaced_by = Carrier(job, run, catalog), ""
        self._sync = Meeting(options.sync_timeout_s)
        self._work = Meeting(options.upload_timeout_s, silence_s=options.sync_timeout_s)
        self._folders = self._asked_for(options.adapter_folder)

    def _asked_for(self, component: str | None) -> adapter.Folders | None:
        if component is None:
            return None
        return adapter.Folders(
            job=self._job, local=self._run.local, local_path=self._run.local_path, component=component,
            meeting=self._work, sync=self._sync,
        )  # fmt: skip

    def known_layout(self, part: Part) -> str:
        """Digest of the layout that the ranks made when this rank brought this very part; empty if never."""
        return self._layouts.known(part)

    def live(self, save: Save) -> SaveError | None:
        """Take one save to its commit, or to the error that every rank gets. Never raises."""
        error: SaveError
        together = False
        try:
            manifest = self._to_commit(save)
        except DisagreementError as err:
            together = not err.missing
            error = outcomes.of_disagreement(save.key, self.catalog.newest, err)
        except CommitUnknownError as err:
            error = err
        except BaseException as err:  # noqa: BLE001 - the ranks' store is gone, or a thread was told to exit
            failure = RankFailure(self._job.rank, "control", type(err).__name__, str(err))
            error = outcomes.of_control(save, self.catalog.newest, failure)
        else:
            self._finish(save, manifest)
            return None
        self._fail(save, error)
        if together:  # a run root that is slow keeps the coordinator longer
            self._job.await_coordinator(f"{save.place}/tidy", self._work)
        return error

    def _to_commit(self, save: Save) -> Manifest:
        agreement = ack.agree(self._job, save.place, save.proposal, self._sync, self._room(save), digests=self._said.of)
        self._forget_previous(save)
        layout = self._mine.guarded(save, "plan", lambda: self._layout(save, agreement))
        record = self._mine.then(save, "write", layout, lambda _: self._write(save))
        record, folder = self._folder(save, record, layout)
        acks = self._acknowledged(save, "local", record, folder)
        manifest = self._mine.then(save, "ack", acks, lambda a: self._commit_locally(save, agreement, a, layout))
        record = self._mine.then(save, "upload", manifest, lambda found: self._upload(save, found, layout))
        acks = self._acknowledged(save, "remote", record)
        manifest = self._mine.then(save, "ack", acks, lambda found: self._acked_remote(save, manifest, found))
        created = functools.partial(self._created, save, manifest)
        save.may_exist = isinstance(manifest, Manifest)
        published = commit.publish(
            self._job, save.place, manifest, self._run.remote, meeting=self._work, within=self._within, created=created
        )
        if published.unknown:
            raise CommitUnknownError(*save.key, self.catalog.newest, published.unknown)
        self._replaced_by = published.replaced
        assert isinstance(manifest, Manifest)  # noqa: S101 - a failure would have ended the meeting
        return manifest

    def check_room(self, size: Size | None) -> None:
        """Whether the local disks can take a first save. Collective; before the first step.

        Args:
            size: Of what this rank would write; None if it does not know yet.

        Raises:
            RootError: They cannot, even without what is whole at the run root; the same on every rank.
        """
        path = self._run.local_path
        try:
            need: Any = DiskNeed.measure(path, rank=self._job.rank, size=size or Size(0))
        except OSError as err:
            need = RankFailure(self._job.rank, "open", type(err).__name__, str(err))
        try:
            ack.agree_on_room(self._job, "open", need, self._sync, lambda: self._retention.make_room(need))
        except DisagreementError as err:
            raise RootError(str(path), "; ".join(map(str, err.failures)) or f"ranks {err.missing} are gone") from None

    def _room(self, save: Save) -> Callable[[], Any]:
        need = save.proposal.disk if isinstance(save.proposal, ack.Proposal) else None
        return lambda: self._mine.tried(save, "plan", lambda: self._retention.make_room(need))

    def _within(self, work: Callable[[], T], given_up: Callable[[], str] | None = None) -> T:
        return self._job.rendezvous.clock.bounded(work, self._options.upload_timeout_s, "a call to the store", given_up)

    def _folder(self, save: Save, record: _Record, layout: Any) -> tuple[_Record, AdapterFolder | None]:
        """Of PEFT, if one is asked for: beside rank 0's shard, before anybody says that all is durable."""
        if self._folders is None:
            return record, None
        make = functools.partial(self._folders.make, save.place, save.key, record, layout)
        made = self._mine.tried(save, "adapter", make)
        return (made, None) if isinstance(made, RankFailure) else (record, made)

    def _acknowledged(
        self, save: Save, phase: str, record: _Record, folder: AdapterFolder | None = None
    ) -> ack.Acks | RankFailure:
        mine = record if isinstance(record, RankFailure) else self._mine.given_up(save, phase) or record
        times = save.pending.timings
        took = (times.stage_s, times.write_s, times.upload_s) if phase == "remote" else ()  # as in OWN
        values = save.replicas.said if phase == "local" and save.replicas is not None else {}
        acknowledge = functools.partial(
            ack.acknowledge, self._job, save.place, phase, mine, self._work, took=took, values=values, adapter=folder
        )
        return self._mine.tried(save, "ack", acknowledge)

    def _layout(self, save: Save, agreement: ack.Agreement) -> bytes:
        """The layout's bytes; then the gate opens and DCP writes."""
        proposal, shard = save.proposal, save.shard
        assert isinstance(proposal, ack.Proposal)  # noqa: S101 - a failure would have ended the meeting
        assert shard is not None  # noqa: S101
        self._job.group.renew(agreement.generation)
        if save.replicas is not None:
            ack.compare_bytes(self._job, save.replicas.held)
        if agreement.gather:
            self._layouts.add(proposal.part, ack.gather_layout(self._job, proposal.part).dumps())
        self._emit(Point.PLAN_AGREED, save)
        shard.open()
        return self._layouts.of(proposal.part)

    def _write(self, save: Save) -> ShardRecord:
        shard = save.shard
        assert shard is not None  # noqa: S101 - staging succeeded, or the meeting would have ended
        if save.replicas is not None:  # beside the writing
            if save.copying is not None:
                save.copying.wait()
            save.replicas.complete(save.image)
        record = shard.record(self._options.upload_timeout_s)
        save.pending.resolve(save.pending.staged)  # a shard that was not copied has been read where it was
        save.pending.timings.write_s = shard.seconds
        save.pending.timings.shard_nbytes = record.nbytes
        self._emit(Point.SHARD_WRITTEN, save, nbytes=record.nbytes, seconds=shard.seconds)
        return record

    def _commit_locally(self, save: Save, agreement: ack.Agreement, acks: ack.Acks, layout: Any) -> Manifest:
        """Every shard is durable on its node; each node notes it, with the bytes the run root will get."""
        stamp = agreement.stamp
        manifest = Manifest(
            run_id=self._run.run_id,
            step=save.key.step,
            attempt=save.key.attempt,
            created=stamp["created"],
            shards=tuple(acks.records),
            layout=LayoutRef(digest=digest(layout), nbytes=len(layout)),
            adapter=acks.adapter,
            metrics={name: float(value) for name, value in stamp["metrics"].items()},
            versions=stamp["versions"],
        )
        upload.put_layout(self._run.local, layout)
        self._run.local.create(manifest.key.manifest, manifest.dumps())
        self.catalog.newest_local = max(save.key.step, self.catalog.newest_local or 0)
        save.pending.timings.local_s = save.elapsed_s()
        save.pending.timings.nbytes = manifest.nbytes
        self._emit(Point.ACKED_LOCAL, save, nbytes=manifest.nbytes, seconds=save.elapsed_s())
        save.pending.resolve(save.pending.local)
        return manifest

    def _upload(self, save: Save, manifest: Manifest, layout: Any) -> ShardRecord | RankFailure:
        began = time.perf_counter()
        record = manifest.shards[self._job.rank]
        given_up = functools.partial(self._mine.why_given_up, save)
        image, save.image = save.image, None
        carried = self._within(lambda: self._carrier.carry(manifest, layout, image), given_up)  # one deadline for all
        if isinstance(carried, RankFailure):
            return carried
        save.pending.timings.upload_s = time.perf_counter() - began
        save.pending.timings.copied_nbytes = carried.copied_nbytes
        detail = f"copied={carried.copied_nbytes}" if carried.copied_nbytes else ""
        self._emit(Point.UPLOADED, save, nbytes=record.nbytes, seconds=save.pending.timings.upload_s, detail=detail)
        return record

    def _acked_remote(self, save: Save, manifest: Manifest | RankFailure, acks: ack.Acks) -> Manifest:
        """Every shard is durable and proven at the run root; nothing is a checkpoint yet."""
        took = {phase: {rank: each[n] for rank, each in enumerate(acks.took)} for n, phase in enumerate(OWN)}
        save.slowest = slowest(took)
        assert isinstance(manifest, Manifest)  # noqa: S101 - a failure would have ended the meeting
        self._emit(Point.ACKED_REMOTE, save, nbytes=manifest.nbytes, seconds=save.elapsed_s())
        return manifest

    def _created(self, save: Save, manifest: Any) -> None:
        self._emit(Point.MANIFEST_CREATED, save, nbytes=manifest.nbytes)

    def _finish(self, save: Save, manifest: Manifest) -> None:
        self.catalog.add(manifest)
        self.catalog.slowest = "" if save.slowest is None else str(save.slowest)
        self._carrier.committed(manifest.shards[self._job.rank])
        save.pending.timings.commit_lag_s = save.elapsed_s()
        detail = f"world_size={manifest.world_size} root={self._run.remote.url}"
        if save.slowest is not None:
            detail += f" slowest={save.slowest}"
        self._emit(Point.COMMITTED, save, nbytes=manifest.nbytes, seconds=save.elapsed_s(), detail=detail)
        save.pending.resolve(save.pending.committed)
        if not self._replaced_by:  # else it is the newer job's to delete
            self._retention.run(save)

    def _forget_previous(self, save: Save) -> None:
        """Every rank has come to this meeting, so all have left those of the save before."""
        if self._job.coordinates and self._previous is not None:
            for phase in ("plan", "compare", "room", "folder", "local", "remote", "commit", "clear", "retain"):
                self._job.rendezvous.forget(f"{self._previous.place}/{phase}")
        self._previous = save

    def _fail(self, save: Save, error: SaveError) -> None:
        self._previous = None  # its verdict stays on the store, for ranks that come late
        durable = save.pending.local.done()
        if save.shard is not None:
            save.shard.refuse(error)
        self._tell(save, error)
        save.pending.resolve(save.pending.committed, error)  # first: a store that hangs makes tidying long
        self._tidy(save, error, durable=durable)

    def _tell(self, save: Save, error: SaveError) -> None:
        mine = [f for f in getattr(error, "failures", ()) if f.rank == self._job.rank]
        skipped = isinstance(error, SaveSkippedError)
        loud = logging.INFO if skipped else logging.WARNING
        level = logging.ERROR if mine else loud if self._job.coordinates else logging.DEBUG
        self._emit(Point.SAVE_SKIPPED if skipped else Point.SAVE_FAILED, save, detail=str(error), level=level)

    def _tidy(self, save: Save, error: SaveError, *, durable: bool) -> None:
        """A failed attempt is deleted; one that broke off when all shards were durable may be finished by a restart."""
        if isinstance(error, CommitUnknownError):
            self.catalog.unknown[save.key.step] = save.key
            return
        if isinstance(error, FencedError):
            return  # this job is over; what it left is the newer one's
        self.catalog.leftovers.add(save.key)
        left = any(failure.error == ClosedError.__name__ for failure in getattr(error, "failures", ()))
        broke_off = isinstance(error, RanksMissingError) or left or save.keeps_files or self.abandoned.is_set()
        if not (broke_off and durable):
            self._retention.discard(save.key, uploading=durable)

    def _emit(self, name: Point, save: Save, **details: Any) -> None:
        save.phase = name
        self._events.emit(name, step=save.key.step, attempt=save.key.attempt, **details)
