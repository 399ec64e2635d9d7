"""What one Checkpointer is made of: the run is opened, and each part is made after those it needs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc.admission import Admission
from dcpsvc.annotating import Annotator
from dcpsvc.announcing import Announcer
from dcpsvc.catalog import Catalog
from dcpsvc.closing import Ending
from dcpsvc.events import Events
from dcpsvc.guarding import Guard
from dcpsvc.laststep import LastStep
from dcpsvc.life import Life
from dcpsvc.observing import Observers, flush
from dcpsvc.observing.runlog import RunLog
from dcpsvc.opening import join, open_run
from dcpsvc.saves import Saves
from dcpsvc.saving import Saver
from dcpsvc.standing import Standing
from dcpsvc.steering import Steering
from dcpsvc.stepping import Stepping
from dcpsvc.uploader import Uploader

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from dcpsvc.config import Options
    from dcpsvc.events import Event
    from dcpsvc.opening import Place
    from dcpsvc.preflight import Size
    from dcpsvc.ranks.job import Job
    from dcpsvc.state.app import AppState
    from dcpsvc.storage.base import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """The parts, tied together.

    Attributes:
        job: The ranks.
        run: The tiers, and this rank's place in them.
        predicted: What this rank would write for a save now; None if that is not known yet.
    """

    job: Job
    run: Place
    catalog: Catalog
    uploader: Uploader
    saver: Saver
    saves: Saves
    last: LastStep
    steering: Steering
    announcer: Announcer
    annotator: Annotator
    guard: Guard
    stepping: Stepping
    ending: Ending
    standing: Standing
    predicted: Size | None


def assemble(
    remote: Store,
    state: AppState,
    options: Options,
    versions: Mapping[str, str],
    let_go: Callable[[Job, Place], None],
) -> Assembly:
    """Open the run and make the parts. Collective. Where it fails no thread stays behind, and no place is taken.

    Args:
        remote: The run root.
        state: What is saved.
        options: How.
        versions: What every checkpoint says about its origin.
        let_go: Called on the uploader's thread when it has ended: nobody uses the ranks and the place any more.

    Raises:
        RootError: On every rank, if any rank cannot use the run root or its local tier.
    """
    job = join(remote.url, options.sync_timeout_s)
    run = _opened(job, remote, options)
    observer = _observer(options, remote, run.local_path)
    events = Events(rank=job.rank, observer=observer)
    catalog = Catalog(
        {attempt.step: attempt for attempt in run.settled.committed}, leftovers=set(run.settled.unfinished)
    )
    life = Life(job, run, options, events, catalog)
    uploader = Uploader(life, functools.partial(let_go, job, run), functools.partial(flush, observer))
    saver = Saver(job, run, state, life, events, options=options, versions=versions)
    predicted = _with_room(life, saver, uploader)
    last = LastStep(state, job.rank, remote.url)
    saves = Saves(Admission(job, options, uploader), saver, uploader, last, catalog=catalog, events=events)
    steering = Steering(job, options, functools.partial(saves.is_overdue, options.every))
    announcer = Announcer(job, run, options, events, catalog)
    annotator = Annotator(
        job, remote, catalog, lambda: uploader.under_way, last=last, timeout_s=options.upload_timeout_s
    )
    return Assembly(
        job=job, run=run, catalog=catalog, uploader=uploader, saver=saver, saves=saves, last=last, steering=steering,
        announcer=announcer, annotator=annotator, predicted=predicted,
        guard=Guard(options.divergence, job, annotator, steering.ask_to_stop),
        stepping=Stepping(
            options=options, catalog=catalog, saver=saver, saves=saves, last=last, steering=steering,
            announcer=announcer,
        ),
        ending=Ending(
            job=job, options=options, events=events, catalog=catalog, uploader=uploader, saver=saver, saves=saves,
            last=last, steering=steering, announcer=announcer, annotator=annotator,
        ),
        standing=Standing(
            run=run, world_size=job.world_size, catalog=catalog, saves=saves, uploader=uploader, last=last,
            steering=steering, announcer=announcer,
        ),
    )  # fmt: skip


def _opened(job: Job, remote: Store, options: Options) -> Place:
    try:
        return open_run(job, remote, options.local_dir, options)
    except BaseException:  # whatever it is, no thread stays behind
        job.leave()
        raise


def _with_room(life: Life, saver: Saver, uploader: Uploader) -> Size | None:
    """What this rank would write for a save now, if all local disks can take it."""
    predicted = saver.predicted()
    try:
        life.check_room(predicted)
    except BaseException:  # whatever it is, no thread stays behind, and the place is given back
        uploader.stop()
        raise
    return predicted


def _observer(options: Options, remote: Store, local_path: Path) -> Callable[[Event], None] | None:
    if not options.run_log:
        return options.on_event
    log = RunLog(remote, spool=local_path / "events")
    return log if options.on_event is None else Observers(log, options.on_event)
