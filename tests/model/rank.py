"""One simulated rank: production code from joining the job to leaving it, on simulated parts."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dcpsvc.config import Options
from dcpsvc.errors import DcpsvcError, FencedError, RankFailure, SaveError
from dcpsvc.events import Event, Events, Point
from dcpsvc.ranks.job import Job
from dcpsvc.ranks.rendezvous import DisagreementError, Meeting, Rendezvous
from dcpsvc.saving import Saver
from dcpsvc.settling import OpenRun, settle
from dcpsvc.state.drift import Terms
from dcpsvc.storage.retry import RetryingStore
from dcpsvc.tiers import Tiers
from tests.model import shard
from tests.model.kernel import Killed
from tests.model.limits import BEAT_S, LEAVE_LIMIT_S, LIVE_LIMIT_S, OPEN_LIMIT_S, SYNC_S, UPLOAD_S
from tests.model.seams import Pulse, SimCatalog, SimLife, SimRendezvous, SimResuming
from tests.model.stores import LocalStore, RemoteStore
from tests.model.wires import MistakeError, SimClock, SimGroup, SimKeyValue

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.catalog import Catalog
    from dcpsvc.life import Life
    from dcpsvc.save import Save
    from dcpsvc.storage.base import Store
    from tests.model.host import Host
    from tests.model.settings import Plan
    from tests.model.wires import GroupServer, KeyValueServer
    from tests.model.world import World

T = TypeVar("T")

_MISTAKE = re.compile(r"has no attribute|positional argument|keyword argument|not iterable|not subscriptable")


class SimRank:
    """A process of the job."""

    def __init__(self, world: World, host: Host, plan: Plan, values: KeyValueServer, groups: GroupServer) -> None:
        self.host, self.plan, self.ledger = host, plan, world.ledger
        self.kernel = host.kernel
        self.finished = False
        self._world, self._groups = world, groups
        self._clock = SimClock(host.kernel, host.process)
        wire = SimKeyValue(host, values, world.settings.grain)
        self._rendezvous = SimRendezvous(host.rank, plan.world_size, wire, self._clock, "join-0")
        self._rendezvous.watch = self._watch
        self._quiet = Rendezvous(host.rank, plan.world_size, Pulse(host, values), self._clock)
        self._beats = 0
        host.token = plan.token
        self._found_owner = world.ledger.owner
        self.last_step = 0

    def main(self) -> None:
        """The process, from start to exit."""
        with contextlib.suppress(_Exit):
            self._work()
        self.finished = True
        self.kernel.kill(self.host.process)

    # --- its life -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        self._found_owner = self.ledger.owner
        job = self._opened("join", self._join)
        self._quiet.namespace = job.incarnation
        self._beat()
        tiers = self._tiers()
        before = self.ledger.newest_confirmed
        meeting = Meeting(UPLOAD_S, silence_s=SYNC_S)
        settled = self._opened("settle", lambda: settle(job, tiers, meeting))
        self.host.epoch = settled.epoch
        self.ledger.settled(self.host, settled)
        run = OpenRun(
            run_id=tiers.run_id, remote=tiers.remote, local=tiers.local, local_path=tiers.local_path, settled=settled
        )
        options = Options(
            sync_timeout_s=SYNC_S, upload_timeout_s=UPLOAD_S, keep=self.plan.keep, keep_local=self.plan.keep_local,
            adapter_folder="model" if self._world.settings.has_folders else None,
        )  # fmt: skip
        committed = {attempt.step: attempt for attempt in settled.committed}
        catalog = SimCatalog(committed, leftovers=set(settled.unfinished))
        catalog.tell = lambda attempt: self.ledger.believed(self.host, attempt)
        events = Events(rank=job.rank, observer=self._observe)
        disk = self._world.disks[self.host.node.disk]
        folders = functools.partial(shard.SimFolders, self.host, disk, job)
        life: Life = SimLife(folders, job, run, options, events, catalog)
        state: Any = None  # it only names the attempts here
        saver = Saver(job, run, state, life, events, options=options, versions={})
        events.emit(Point.OPENED)
        if settled.recovered:
            events.emit(Point.RECOVERED)
        start = self._opened("resume", lambda: self._resume(job, run, catalog, before))
        events.emit(Point.RESUMED, step=start)
        if self._train(job, life, saver, events, start):
            self._heal(job, life, saver, events, start + self.plan.saves + 100)
        self._leave(job)
        events.emit(Point.CLOSED)

    def _opened(self, what: str, work: Callable[[], Any]) -> Any:
        """Before the first step any typed error ends the process, as an exception in a script does."""
        try:
            return self._timed(what, OPEN_LIMIT_S, work)
        except (DisagreementError, DcpsvcError, RuntimeError) as err:
            self.kernel.note(f"{what} failed", str(err)[:200])
            self.ledger.outcomes[f"{what} failed: {type(err).__name__}"] += 1
            self.ledger.owners.refused(self.host, err)
            if self.plan.must_succeed and self.ledger.owner.token in {self._found_owner.token, self.plan.token}:
                self.ledger.escaped(self.host, f"{what}, with nothing wrong any more,", err)
            raise _Exit from None
        except Exception as err:
            self.ledger.escaped(self.host, what, err)
            raise

    def _join(self) -> Job:
        plan = self.plan
        said = self._rendezvous.meet("open/join", None, lambda _: plan.token, Meeting(SYNC_S))
        self._rendezvous.namespace = said
        group = SimGroup(self.host, self._groups, plan.world_size, SYNC_S)
        group.renew(0)
        return Job(self.host.rank, plan.world_size, said, self._rendezvous, group)

    def _tiers(self) -> Tiers:
        world, host = self._world, self.host
        remote: Store = RemoteStore(host, world.root, world.disks, atomic_create=world.settings.atomic_create)
        if world.settings.retrying:
            remote = RetryingStore(
                remote, tries=3, deadline_s=1.5, wait_max_s=0.2, clock=self._clock.now, pause=self._pause
            )
        disk = host.node.disk
        local = LocalStore(host, world.disks[disk], world.disks)
        return Tiers(run_id="r1", remote=remote, local=local, local_path=Path(f"/sim/{disk}"))

    def _pause(self, seconds: float) -> bool:
        self.kernel.wait(seconds)
        return False

    def _resume(self, job: Job, run: OpenRun, catalog: Catalog, newest_before: int) -> int:
        resuming = SimResuming(job, "resume-1", run.remote, [run.local], None, SYNC_S, UPLOAD_S)  # type: ignore[arg-type]
        earlier = [attempt.step for attempt in run.settled.committed][:-1] if self.plan.steps_back else []
        found = resuming.run(earlier[-1] if earlier else None, Terms())
        if not earlier:
            self.ledger.chose(self.host, found and found.attempt, newest_before)
        if found is None:
            return 0
        catalog.set_aside(found.attempt.step, damaged=not earlier)
        catalog.in_use[found.attempt] = "resumed from"
        return found.attempt.step

    def _train(self, job: Job, life: Life, saver: Saver, events: Events, start: int) -> bool:
        """Some saves; whether the job goes on."""
        for step in range(start + 1, start + 1 + self.plan.saves):
            self.kernel.wait(self.kernel.random.random() * 0.1)
            self.host.step = step - start
            self.host.refuses_upload = self.host.rank == 1 and self.host.step == self.plan.spoiled
            self.host.faults.advance()
            fault = self.host.faults.strike("save")
            if fault in {"crash", "freeze"}:
                self.host.fall(fault, "training step", lambda: None, 0.01)
            elif fault == "skips":
                continue
            elif fault == "late":
                self.kernel.wait(self.kernel.random.random() * 2.5)
            named = step + 50 if fault == "other-step" else step
            error = self._save(job, life, saver, events, named, fault)
            if isinstance(error, FencedError) or fault == "abandoned":
                return False
            if error is not None and self.plan.must_succeed and self.ledger.owner == self.host.epoch:
                self.ledger.escaped(self.host, "a save with nothing wrong any more", error)
            self.last_step = step
        return True

    def _heal(self, job: Job, life: Life, saver: Saver, events: Events, step: int) -> None:
        """If every rank is still there once everything that went wrong is over, the next save succeeds."""
        if not self.plan.patient or not self._world.assemble(self.plan):
            return
        self.host.refuses_upload = False
        error = self._save(job, life, saver, events, step, None)
        if error is not None and self.ledger.owner == self.host.epoch:
            self.ledger.escaped(self.host, "a save after all had healed", error)
        self.ledger.outcomes["rank saved again after all had healed"] += 1

    def _save(  # noqa: PLR0917
        self, job: Job, life: Life, saver: Saver, events: Events, step: int, fault: str | None
    ) -> SaveError | None:
        if life.catalog.taken(step) is not None:
            return None
        save = saver.accept(step, time.perf_counter())
        if fault == "staging":
            save.proposal = RankFailure(job.rank, "stage", "MemoryError", "simulated")
        else:
            said = "another" if fault == "other-structure" else self._world.settings.structure(step)
            known = life.known_layout(shard.layout_part(job.rank, job.world_size, said))
            proposal = shard.proposal(job.rank, job.world_size, step, said, known)
            save.proposal = replace(proposal, disk=shard.need(self.host, fault))
            save.pending.resolve(save.pending.staged)
            save.shard = shard.SimShard(self.host, self._world.disks[self.host.node.disk], save.key)
            events.emit(Point.STAGED, step=step)
        if fault == "dropped":
            self.kernel.at(self.kernel.random.random(), lambda: setattr(save, "dropped", "a newer one waits"))
        elif fault == "abandoned":
            self.kernel.at(self.kernel.random.random(), life.abandoned.set)
        return self._live(life, save)

    def _live(self, life: Life, save: Save) -> SaveError | None:
        self.host.troubled = False
        self.kernel.note("save begins", str(save.key))
        try:
            error = self._timed(f"the life of {save.key}", LIVE_LIMIT_S, lambda: life.live(save))
        except Exception as err:
            self.ledger.escaped(self.host, f"the life of {save.key}", err)
            raise
        if self.host.process.dead:  # unwinding: what it says now nobody hears
            raise Killed
        self.kernel.note("save ends", f"{save.key} {error or 'committed'}")
        self.ledger.heard(self.host, save.key, error)
        return error

    def _leave(self, job: Job) -> None:
        def close() -> None:
            job.meet("close", None, lambda _: None, Meeting(SYNC_S, SYNC_S))
            job.linger("close", SYNC_S)

        with contextlib.suppress(DisagreementError, RuntimeError):
            self._timed("close", LEAVE_LIMIT_S, close)
        job.leave()

    def _timed(self, what: str, limit_s: float, work: Callable[[], T]) -> T:
        began = self.kernel.now
        try:
            return work()
        finally:
            self._watch(what, began, limit_s)

    def _watch(self, what: str, began: float, limit_s: float) -> None:
        """Standing still does not count: nobody can be asked to hurry while stopped."""
        process = self.host.process
        if not process.dead:
            took_s = self.kernel.now - began - process.frozen_since(began)
            self.ledger.took(self.host, what, took_s, limit_s)

    # --- its other threads --------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """The heartbeat: light, because it beats all the time; a process that stands still does not beat."""
        if self.host.process.dead:
            return
        if not self.host.process.frozen:
            with contextlib.suppress(RuntimeError):
                self._quiet.beat(self._beats)
            self._beats += 1
        self.kernel.at(BEAT_S, self._beat)

    def _deserts(self) -> bool:
        """Does not live to tidy up after a save that has failed."""
        share, faults = self._world.settings.desertion, self.host.faults
        return self.host.rank > 0 and not faults.calm and self.kernel.random.random() < share

    def _observe(self, event: Event) -> None:
        if event.name == Point.RETAINED and _MISTAKE.search(event.detail):
            self.kernel.failure = MistakeError(event.detail)
        label = f"point {event.name}"
        if event.name == Point.ACKED_REMOTE:
            self.host.acked = self.kernel.now
        self.host.at_switch(label)
        fault = self.host.faults.strike("point", label)
        if event.name == Point.SAVE_FAILED and self._deserts():
            fault = "crash"
        if fault is not None:
            self.host.fall(fault, label, lambda: None, 0.001)


class _Exit(Exception):  # noqa: N818 - the process ends
    pass
