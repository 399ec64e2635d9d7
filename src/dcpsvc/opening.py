"""Opening a run: every rank reaches the run root and its local tier, and all hear the same about it."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from dcpsvc import identity, placelock
from dcpsvc.errors import (
    RankFailure,
    RootError,
    RunBusyError,
    StoreError,
    UnsupportedFormatError,
)
from dcpsvc.format import keys, run
from dcpsvc.ranks.job import Job
from dcpsvc.ranks.rendezvous import DisagreementError, Meeting
from dcpsvc.settling import OpenRun, settle
from dcpsvc.storage import posixfile
from dcpsvc.storage.posix import PosixStore
from dcpsvc.tiers import Tiers, note_root

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dcpsvc.config import Options
    from dcpsvc.storage.base import Store

T = TypeVar("T")


def join(url: str, timeout_s: float) -> Job:
    """Meet the other ranks.

    Raises:
        RootError: They did not come, or cannot be reached; the same on every rank that did.
    """
    try:
        return Job.join(timeout_s)
    except DisagreementError as err:
        reason = f"ranks {err.missing} did not make their Checkpointer within {err.waited_s:.1f} s"
        raise RootError(url, reason) from None
    except RuntimeError as err:
        raise RootError(url, f"the ranks cannot be reached: {err}") from err


@dataclass(slots=True, kw_only=True)
class Place(OpenRun):
    """A run that this process holds its rank's place in."""

    lock: int

    def release(self) -> None:
        """Let another process have this rank's place."""
        placelock.release(self.lock)


def open_run(job: Job, remote: Store, local_dir: Path, options: Options) -> Place:
    """Collective. Afterwards every rank can write to both tiers, all see the same run root, and this job owns it.

    Raises:
        RootError: On every rank, when any rank cannot: unwritable, not shared, another format, in use.
    """
    meeting = Meeting(options.upload_timeout_s, silence_s=options.sync_timeout_s)  # a slow store is no missing rank

    def within(work: Callable[[], T]) -> T:
        return job.rendezvous.clock.bounded(work, options.upload_timeout_s, "opening the run root")

    try:
        run_id = job.meet("open/root", None, lambda _: within(lambda: _find_run(remote)), meeting)
        path = local_dir / run_id
        tiers = Tiers(run_id=run_id, remote=remote, local=PosixStore(path), local_path=path)
        return _join_run(job, tiers, within, meeting)
    except DisagreementError as err:
        raise _as_root_error(remote.url, err) from None
    except RuntimeError as err:
        raise RootError(remote.url, f"the ranks cannot be reached: {err}") from err


def _find_run(remote: Store) -> str:
    """Coordinator: the run's identity, created if this is the first job here."""
    found = identity.find(remote)
    if found is None:
        created = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        found = run.Run(run_id=secrets.token_hex(6), created=created)
        if not remote.create(keys.RUN, found.dumps()):
            found = run.loads(remote.url, remote.get(keys.RUN, max_nbytes=run.MAX_NBYTES))
    return found.run_id


def _join_run(job: Job, tiers: Tiers, within: Callable[[Callable[[], None]], None], meeting: Meeting) -> Place:
    message: RankFailure | None = None
    lock = -1
    try:
        lock = _take_place(job, tiers)
        within(lambda: _try_out(job, tiers))
    except Exception as err:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        message = RankFailure(job.rank, "open", type(err).__name__, str(err))
    try:
        job.meet("open/ready", message, lambda _: None, meeting)
        settled = settle(job, tiers, meeting)
        _remove_unfinished(tiers.local, job)
    except BaseException:  # whatever it is, the place is given back
        placelock.release(lock)
        raise
    return Place(
        run_id=tiers.run_id, remote=tiers.remote, local=tiers.local, local_path=tiers.local_path,
        settled=settled, lock=lock,
    )  # fmt: skip


def _take_place(job: Job, tiers: Tiers) -> int:
    local_dir = tiers.local_path.parent
    local_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_owner(local_dir)
    tiers.local_path.mkdir(exist_ok=True)
    lock = placelock.take(tiers.local_path / f"rank-{job.rank:05d}.lock")
    try:
        note_root(tiers.local_path, tiers.remote.url)
    except BaseException:  # whatever it is, the place is given back
        placelock.release(lock)
        raise
    return lock


def _try_out(job: Job, tiers: Tiers) -> None:
    _probe(tiers.local, job, keep=True)
    _probe(tiers.remote, job)
    _check_shared(tiers.remote, tiers.run_id)


def _check_owner(local_dir: Path) -> None:
    """In a directory everybody may write to, such as /tmp, the local tier must be of our own making."""
    owner = posixfile.stranger(local_dir)
    if owner is not None:
        raise RootError(
            str(local_dir), f"belongs to user {owner}, who could read the checkpoints; use local= elsewhere"
        )


def _remove_unfinished(local: Store, job: Job) -> None:
    """What killed writers left on this disk. All ranks have made their probes: nobody of this start is writing."""
    key = f"{keys.PROBES}{job.incarnation}-{job.rank:05d}"
    try:
        local.remove_unfinished(before=key)
        local.delete(key)
    except StoreError as err:  # it takes room and does no other harm
        logging.getLogger("dcpsvc").warning("unfinished files stay: %s", err)


def _probe(store: Store, job: Job, *, keep: bool = False) -> None:
    """A real write and delete: permissions are known before the first step, not at the first save."""
    key = f"{keys.PROBES}{job.incarnation}-{job.rank:05d}"
    store.put(key, b"probe\n")
    if not keep:
        store.delete(key)


def _check_shared(remote: Store, run_id: str) -> None:
    """What this rank reads at the run root must be what the coordinator wrote there."""
    found = identity.find(remote)
    if found is None or found.run_id != run_id:
        seen = f"run {found.run_id}" if found else "nothing"
        raise RootError(
            remote.url, f"not the same place on all ranks: the coordinator sees run {run_id}, this rank {seen}"
        )


def _as_root_error(url: str, err: DisagreementError) -> RootError:
    kinds: dict[str, type[RootError]] = {"UnsupportedFormatError": UnsupportedFormatError, "RunBusyError": RunBusyError}
    failed = [f"rank {failure.rank}: {failure.text}" for failure in err.failures]
    if err.missing:
        failed.append(f"ranks {err.missing} did not arrive within {err.waited_s:.1f} s")
    kind = kinds.get(err.failures[0].error, RootError) if err.failures else RootError
    return kind(url, "; ".join(failed))
