"""Opening a run: every rank reaches the run root and its local tier, and all hear the same about it."""

from __future__ import annotations

import logging
import os
import secrets
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dcpsvc import placelock
from dcpsvc.errors import (
    RankFailure,
    RootError,
    RunBusyError,
    StoreError,
    StoreNotFoundError,
    UnsupportedFormatError,
)
from dcpsvc.format import keys, run
from dcpsvc.format.keys import Attempt
from dcpsvc.ranks.rendezvous import DisagreementError, Meeting
from dcpsvc.stages import discover, retain
from dcpsvc.storage.posix import PosixStore

if TYPE_CHECKING:
    from pathlib import Path

    from dcpsvc.ranks.job import Job
    from dcpsvc.storage.base import Store


@dataclass(slots=True)
class OpenRun:
    """One rank's hold on a run.

    Attributes:
        run_id: Identity of the run root.
        remote: The run root.
        local: This node's tier for this run, with the layout of the run root.
        local_path: Where that is.
        committed: Attempts with a manifest when the run was opened, ascending; the same on every rank.
    """

    run_id: str
    remote: Store
    local: PosixStore
    local_path: Path
    committed: list[Attempt]
    _lock: int

    def release(self) -> None:
        """Let another process have this rank's place."""
        placelock.release(self._lock)


def open_run(job: Job, remote: Store, local_dir: Path, sync_timeout_s: float) -> OpenRun:
    """Collective. Afterwards every rank can write to both tiers and all see the same run root.

    Raises:
        RootError: On every rank, when any rank cannot: unwritable, not shared, another format, in use.
    """
    meeting = Meeting(sync_timeout_s)
    try:
        found = job.meet("open/root", None, lambda _: _find_run(remote), meeting)
        return _join_run(job, remote, local_dir, found["run_id"], meeting)
    except DisagreementError as err:
        raise _as_root_error(remote.url, err) from None


def _find_run(remote: Store) -> dict[str, Any]:
    """Coordinator: the run's identity, created if this is the first job here, and what is committed."""
    try:
        found = run.loads(remote.url, remote.get(keys.RUN, max_nbytes=run.MAX_NBYTES))
    except StoreNotFoundError:
        created = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        found = run.Run(run_id=secrets.token_hex(6), created=created)
        if not remote.create(keys.RUN, found.dumps()):
            found = run.loads(remote.url, remote.get(keys.RUN, max_nbytes=run.MAX_NBYTES))
    return {"run_id": found.run_id}


def _join_run(job: Job, remote: Store, local_dir: Path, run_id: str, meeting: Meeting) -> OpenRun:
    message: Any
    opened: OpenRun | None = None
    try:
        opened = _take_place(job, remote, local_dir, run_id)
        message = _take_stock(opened) if job.coordinates else None
    except Exception as err:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        message = RankFailure(job.rank, "open", type(err).__name__, str(err))
    try:
        stock = job.meet("open/ready", message, lambda said: said[0], meeting)
        assert opened is not None  # noqa: S101 - a failure would have ended the meeting
        opened.committed = [Attempt(*attempt) for attempt in stock["committed"]]
        try:
            _sweep(job, opened, [Attempt(*attempt) for attempt in stock["dead"]])
        except StoreError as err:  # debris is invisible; it must not stop this rank while the others go on
            logging.getLogger("dcpsvc").warning("debris of an earlier job stays: %s", err)
    except BaseException:  # whatever it is, the place is given back
        if opened is not None:
            opened.release()
        raise
    return opened


def _take_place(job: Job, remote: Store, local_dir: Path, run_id: str) -> OpenRun:
    local_path = local_dir / run_id
    local_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_owner(local_dir)
    local_path.mkdir(exist_ok=True)
    lock = placelock.take(local_path / f"rank-{job.rank:05d}.lock")
    try:
        local = PosixStore(local_path)
        _probe(local, job)
        _probe(remote, job)
        _check_shared(remote, run_id)
    except BaseException:  # whatever it is, the place is given back
        placelock.release(lock)
        raise
    return OpenRun(run_id, remote, local, local_path, [], lock)


def _check_owner(local_dir: Path) -> None:
    """In a directory everybody may write to, such as /tmp, the local tier must be of our own making."""
    sticky, owner = local_dir.parent.stat().st_mode & stat.S_ISVTX, local_dir.stat().st_uid
    if sticky and owner != os.geteuid():
        raise RootError(
            str(local_dir), f"belongs to user {owner}, who could read the checkpoints; use local= elsewhere"
        )


def _probe(store: Store, job: Job) -> None:
    """A real write and delete: permissions are known before the first step, not at the first save."""
    key = f"{keys.PROBES}{job.incarnation}-{job.rank:05d}"
    store.put(key, b"probe\n")
    store.delete(key)


def _check_shared(remote: Store, run_id: str) -> None:
    """What this rank reads at the run root must be what the coordinator wrote there."""
    try:
        seen = run.loads(remote.url, remote.get(keys.RUN, max_nbytes=run.MAX_NBYTES)).run_id
    except StoreNotFoundError:
        seen = "nothing"
    if seen != run_id:
        raise RootError(
            remote.url, f"not the same place on all ranks: the coordinator sees run {run_id}, this rank {seen}"
        )


def _take_stock(opened: OpenRun) -> dict[str, Any]:
    """Coordinator, lock in hand: what is committed, and which attempts died.

    An attempt with a shard of rank 0 on this disk was made by a coordinator on this disk, and that process is dead:
    its lock is ours now. So nobody can commit it any more, and what is not committed at this moment never will be.
    """
    retain.finish_removals(opened.remote)
    committed = discover.committed(opened.remote)
    shards = [entry.key for entry in opened.local.list(keys.DATA) if entry.key.endswith("/rank-00000.safetensors")]
    dead = {attempt for key in shards if (attempt := keys.attempt_of(key)) is not None} - set(committed)
    return {"committed": [list(attempt) for attempt in committed], "dead": [list(attempt) for attempt in sorted(dead)]}


def _sweep(job: Job, opened: OpenRun, dead: list[Attempt]) -> None:
    """Remove what dead attempts left: each rank its own disk, the coordinator the run root."""
    committed = set(opened.committed)
    for entry in opened.local.list(keys.DATA):
        attempt = keys.attempt_of(entry.key)
        if attempt is not None and attempt not in committed and entry.key == attempt.shard(job.rank):
            retain.remove_local(opened.local, attempt, job.rank)
    for attempt in dead:  # nobody can commit these: whoever comes first removes the shards of ranks that are no more
        retain.remove_data(opened.local, attempt)
        if job.coordinates:
            retain.remove_data(opened.remote, attempt)


def _as_root_error(url: str, err: DisagreementError) -> RootError:
    kinds: dict[str, type[RootError]] = {"UnsupportedFormatError": UnsupportedFormatError, "RunBusyError": RunBusyError}
    failed = [f"rank {failure.rank}: {failure.text}" for failure in err.failures]
    if err.missing:
        failed.append(f"ranks {err.missing} did not arrive within {err.waited_s:.1f} s")
    kind = kinds.get(err.failures[0].error, RootError) if err.failures else RootError
    return kind(url, "; ".join(failed))
