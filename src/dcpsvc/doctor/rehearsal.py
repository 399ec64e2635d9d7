"""A real small checkpoint at the real destination: saved, committed, verified, loaded, compared and deleted."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dcpsvc import progress
from dcpsvc.checkpointer import Checkpointer
from dcpsvc.doctor.findings import Finding, Verdict, broken, ok
from dcpsvc.doctor.forecast import Measured
from dcpsvc.errors import DcpsvcError, StoreError
from dcpsvc.loading import load
from dcpsvc.progress import duration, size
from dcpsvc.reading import open_root
from dcpsvc.state.sharing import PerRank
from dcpsvc.tools import verifying

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dcpsvc.storage.base import Store

_REMEDY = "the lines above say what this needs; nothing of it stays behind"
_SMALLER = 8
"""The smaller save is so many times smaller."""

_REPEATED = 3
"""Saves of each size; the fastest counts, for a disk that was busy with something else says nothing."""

_LAST = 2 * _REPEATED

_SETTLE_S, _SLOWEST_NBYTES_PER_S = 60.0, 2**20
"""A place that takes longer for a small save is no place for a job, and nobody waits for half an hour to hear it."""


def rehearse(
    root: str, local: Path, rank: int, *, nbytes: int, options: Mapping[str, Any], timeout_s: float, quiet: bool = True
) -> tuple[list[Finding], Measured | None]:
    """Do it. Collective; every rank gets its own findings. The root and ``local`` must be new.

    Args:
        root: Where, below the real run root.
        local: Where, below the real local tier.
        rank: This one.
        nbytes: What each rank saves.
        options: For fsspec.
        timeout_s: Longest wait for a peer.
        quiet: Do not show how far it is; else rank 0 does.
    """
    quiet |= rank != 0
    payload = torch.arange(nbytes // 8, dtype=torch.int64) * (rank + 1)
    try:
        with progress.shown("saved", _REPEATED * (payload.nbytes + _smaller(payload).nbytes), quiet=quiet) as advance:
            measured = _save(root, local, payload, options, timeout_s, advance=advance)
        found = [ok("save and commit", _told(measured))]
        found.append(
            _verified(root, options, quiet=quiet) if rank == 0 else ok("verify", "every byte as it was written")
        )
        began = time.perf_counter()
        found.append(_loaded(root, payload, options, timeout_s))
        measured["load_s"] = time.perf_counter() - began
    except (DcpsvcError, OSError, RuntimeError) as err:
        return [broken("save and commit", err, _REMEDY)], None
    finally:
        shutil.rmtree(local, ignore_errors=True)
    return found, Measured(ranks=1, **measured)


def _save(
    root: str | Store,
    local: Path,
    payload: torch.Tensor,
    options: Mapping[str, Any],
    timeout_s: float,
    *,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Saves of two sizes; the first of each pays for what is made once."""
    state = {"doctor": PerRank(payload)}
    stage_s = timeout_s + _SETTLE_S + payload.nbytes / _SLOWEST_NBYTES_PER_S
    with Checkpointer(
        root, state, local=local, storage_options=options, sync_timeout_s=timeout_s, upload_timeout_s=stage_s,
        save_last=False, stop_signals=(),
    ) as ckpt:  # fmt: skip
        most_s = 3 * stage_s  # to the disk, to the run root, and to hear of both
        state["doctor"] = PerRank(_smaller(payload))
        smaller = _fastest(ckpt, range(1, _REPEATED + 1), most_s, advance)
        state["doctor"] = PerRank(payload)
        return _fastest(ckpt, range(_REPEATED + 1, _LAST + 1), most_s, advance) | {"smaller": smaller}


def _smaller(payload: torch.Tensor) -> torch.Tensor:
    return payload[: max(1, payload.numel() // _SMALLER)]


def _fastest(ckpt: Checkpointer, steps: range, most_s: float, advance: Callable[[int], None]) -> dict[str, float]:
    """What a save took, but for the first."""
    found: list[dict[str, float]] = []
    for step in steps:
        pending = ckpt.save(step)
        pending.wait(most_s)
        ckpt.wait(most_s)
        times = pending.timings
        advance(times.shard_nbytes)
        found.append(
            {
                "shard_nbytes": times.shard_nbytes,
                "blocked_s": times.blocked_s + times.held_s,
                "local_s": times.local_s,
                "commit_s": times.commit_lag_s,
            }
        )
    return {name: min(one[name] for one in found[1:]) for name in found[0]}


def _told(measured: Mapping[str, Any]) -> str:
    blocked, local, commit = (duration(measured[name]) for name in ("blocked_s", "local_s", "commit_s"))
    wrote = f"{size(measured['shard_nbytes'])} a rank: training waited {blocked}"
    return f"{wrote}, on the local disks after {local}, committed after {commit}"


def _verified(root: str, options: Mapping[str, Any], *, quiet: bool) -> Finding:
    store = open_root(root, options)
    attempts = verifying.commits(store, None)
    with progress.shown("verified", verifying.planned_nbytes(store, attempts), quiet=quiet) as advance:
        findings = verifying.verify(store, attempts, advance)
    problems = [problem for finding in findings for problem in finding.problems]
    if problems:
        remedy = "use another store: this one loses or changes bytes"
        return Finding(name="verify", verdict=Verdict.FAIL, found="; ".join(problems), remedy=remedy)
    return ok("verify", "every byte as it was written")


def _loaded(root: str, payload: torch.Tensor, options: Mapping[str, Any], timeout_s: float) -> Finding:
    state: dict[str, Any] = {"doctor": PerRank(torch.zeros_like(payload))}
    load(root, state, _LAST, storage_options=options, sync_timeout_s=timeout_s)
    if torch.equal(state["doctor"].value, payload):
        return ok("load", "every rank got its own back")
    remedy = "please report this: the bytes were proven and are not what was saved"
    return Finding(
        name="load", verdict=Verdict.FAIL, found="what was loaded differs from what was saved", remedy=remedy
    )


def remove(store: Store) -> Finding:
    """Delete all of it, and see that nothing is left. One rank, after all have done."""
    try:
        for entry in store.list(""):
            store.delete(entry.key)
        left = store.list("")
    except StoreError as err:
        return broken("delete", err, f"remove {store.url} by hand, and let this user delete below the run root")
    if left:
        remedy = f"remove {store.url} by hand"
        return Finding(name="delete", verdict=Verdict.WARN, found=f"{len(left)} objects stay", remedy=remedy)
    return ok("delete", "nothing is left")


def folders_above(root: str) -> set[Path]:
    """Those above ``root`` that are there already; a URL has none."""
    return set() if "://" in root else {folder for folder in Path(root).absolute().parents if folder.exists()}


def prune(root: str, was_there: set[Path]) -> None:
    """Remove the empty folders that were made; on a URL there are none."""
    if "://" in root:
        return
    path = Path(root).absolute()
    for folder in sorted(path.rglob("*"), reverse=True):
        with suppress(OSError):
            folder.rmdir()
    for folder in (path, *path.parents):
        if folder in was_there:
            return
        with suppress(OSError):
            folder.rmdir()
