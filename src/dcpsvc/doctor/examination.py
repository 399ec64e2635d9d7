"""The whole examination, on every rank together: machine, run root, a rehearsal, and what follows from it."""

from __future__ import annotations

import os
import secrets
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dcpsvc import identity, preflight
from dcpsvc.doctor import machine, place, rehearsal
from dcpsvc.doctor.findings import Finding, Verdict, broken, merged, ok, worst
from dcpsvc.doctor.forecast import Forecast, Measured, forecast, scaled
from dcpsvc.errors import DcpsvcError
from dcpsvc.format.keys import PROBES
from dcpsvc.progress import duration
from dcpsvc.ranks.job import Job
from dcpsvc.ranks.rendezvous import Meeting
from dcpsvc.reading import latest
from dcpsvc.stages import discover
from dcpsvc.storage.names import redact
from dcpsvc.storage.open import open_store

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from pathlib import Path

    from dcpsvc.storage.base import Store

_SHARED = "shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to examine.

    Attributes:
        root: The run root; None examines this machine, with a run root on the local tier.
        local: The local tier.
        options: For fsspec.
        nbytes: What each rank saves in the rehearsal.
        model_nbytes: Size of the checkpoints to come; None takes that of the newest commit, if there is one.
        like: Its step then.
        folder_nbytes: What of that size is the folder of PEFT, on rank 0's disk.
        ranks: That will share it; None takes as many as wrote that commit, else as many as examine.
        mtbf_s: Mean time between failures of the job to come.
        grace_s: What the cluster leaves a job between SIGTERM and SIGKILL.
        timeout_s: Longest wait for a peer.
        quiet: Do not show how far it is.
    """

    root: str | None
    local: Path
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    nbytes: int = 64 << 20
    model_nbytes: int | None = None
    like: int | None = None
    folder_nbytes: int = 0
    ranks: int | None = None
    mtbf_s: float = 86400.0
    grace_s: float = 25.0
    timeout_s: float = 60.0
    quiet: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What came out; the same on every rank.

    Attributes:
        root: What was examined.
        ranks: How many looked.
        findings: One for each thing.
        measured: The rehearsal, as the slowest rank saw it; None if it failed.
        forecast: None without a rehearsal or the size of a model.
    """

    root: str
    ranks: int
    findings: tuple[Finding, ...]
    measured: Measured | None
    forecast: Forecast | None

    @property
    def passed(self) -> bool:
        """Whether jobs work here."""
        return worst(self.findings) is not Verdict.FAIL

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-like values."""
        return asdict(self) | {"passed": self.passed}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Examination:
        """What :meth:`to_json` gave."""
        return cls(
            root=said["root"],
            ranks=said["ranks"],
            findings=tuple(Finding.from_json(finding) for finding in said["findings"]),
            measured=said["measured"] and Measured(**said["measured"]),
            forecast=said["forecast"] and Forecast(**said["forecast"]),
        )


def examine(plan: Plan) -> tuple[Examination, int]:
    """Examine, and say as which rank. Collective over the ranks of a launcher, if one has set its variables.

    Everything it writes lies below ``<root>/probes/doctor-<token>`` and ``<local>/doctor-<token>``, and is removed.

    Raises:
        DisagreementError: A rank does not come.
        RuntimeError: The ranks cannot reach each other.
    """
    with _ranks(plan.timeout_s):
        job = Job.join(plan.timeout_s)
        try:
            said = _examine(job, plan)
            with suppress(RuntimeError):
                job.linger("doctor", plan.timeout_s)
        finally:
            job.leave()
        return Examination.from_json(said), job.rank


@contextmanager
def _ranks(timeout_s: float) -> Generator[None]:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    from datetime import timedelta

    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        dist.destroy_process_group()


def _examine(job: Job, plan: Plan) -> Any:
    meeting = Meeting(max(plan.timeout_s, 600.0), silence_s=plan.timeout_s)
    token = job.meet("doctor/begin", None, lambda _: secrets.token_hex(4), meeting)
    findings = _clocks(job, meeting)
    masks: list[tuple[str, list[int]]] = job.meet("doctor/cpus", machine.mask(), lambda said: said, meeting)
    root, local = _places(plan, token)
    was_there = rehearsal.folders_above(root)
    store, trouble = _opened(root, plan)
    looked = _look_at(job, store, token, meeting)
    plan = _sized(job, plan, looked, meeting)
    findings += [*trouble, *machine.examine(_machine(job, plan, masks)), *looked]
    measured: Measured | None = None
    if store is not None:
        more, measured = rehearsal.rehearse(
            f"{root}/run", local, job.rank, nbytes=plan.nbytes, options=plan.options, timeout_s=plan.timeout_s,
            quiet=plan.quiet,
        )  # fmt: skip
        findings += [*more, *place.credentials(store, _save_s(job, plan, measured), time.time())]
    job.meet("doctor/tidy", None, lambda _: None, meeting)
    if job.coordinates and store is not None:
        findings.append(rehearsal.remove(store))
        rehearsal.prune(root, was_there)
    mine = {"findings": [one.to_json() for one in findings], "measured": measured and measured.to_json()}
    return job.meet("doctor/end", mine, lambda all_: _sum_up(plan, all_), meeting)


def _clocks(job: Job, meeting: Meeting) -> list[Finding]:
    """How far those of the ranks are apart."""
    began = time.monotonic()
    times: list[float] = job.meet("doctor/clock", time.time(), lambda said: said, meeting)
    return [place.clocks(times, time.monotonic() - began)] if job.world_size > 1 else []


def _opened(root: str, plan: Plan) -> tuple[Store | None, list[Finding]]:
    """The place to write to, or what is wrong with it or with the run root."""
    try:
        store = open_store(root, plan.options)
        if plan.root is not None:
            identity.check_folder(open_store(plan.root, plan.options))
    except DcpsvcError as err:
        return None, [broken("run root", err, "check the path or URL, and -o KEY=VALUE")]
    return store, []


def _sized(job: Job, plan: Plan, looked: list[Finding], meeting: Meeting) -> Plan:
    """With the size of the newest commit, if nobody said another; where nothing can be read there is none."""
    mine: list[int | None] | None = None
    if job.coordinates and plan.model_nbytes is None and plan.root is not None and worst(looked) is not Verdict.FAIL:
        with suppress(DcpsvcError):
            if (newest := latest(plan.root, storage_options=plan.options, checked=False)) is not None:
                folder = discover.read_manifest(open_store(plan.root, plan.options), newest.key).adapter
                mine = [newest.step, newest.nbytes, newest.world_size, folder.nbytes if folder else 0]
    told = job.meet("doctor/size", mine, lambda said: next(filter(None, said), None), meeting)
    if told is None:
        return plan
    step, nbytes, ranks, folder_nbytes = told
    return replace(plan, like=step, model_nbytes=nbytes, ranks=plan.ranks or ranks, folder_nbytes=folder_nbytes)


def _save_s(job: Job, plan: Plan, measured: Measured | None) -> float | None:
    """How long a save takes until its commit: one of the model, if its size is known."""
    if measured is None:
        return None
    if plan.model_nbytes is None:
        return measured.commit_s
    return max(measured.commit_s, scaled(measured, "commit_s", plan.model_nbytes / (plan.ranks or job.world_size)))


def _machine(job: Job, plan: Plan, masks: list[tuple[str, list[int]]]) -> machine.Machine:
    shards = None if plan.model_nbytes is None else plan.model_nbytes - plan.folder_nbytes
    shard_nbytes = None if shards is None else shards // (plan.ranks or job.world_size)
    folder_nbytes = plan.folder_nbytes if masks[0][0] == machine.mask()[0] else 0
    here = tuple(frozenset(cpus) for host, cpus in masks if host == machine.mask()[0])
    ranks = preflight.ranks_here(os.environ)
    return machine.Machine(
        local=plan.local, shard_nbytes=shard_nbytes, ranks=ranks, folder_nbytes=folder_nbytes, masks=here
    )


def _places(plan: Plan, token: str) -> tuple[str, Path]:
    base = str(plan.local / "root") if plan.root is None else plan.root.rstrip("/")
    return f"{base}/{PROBES}doctor-{token}", plan.local / f"doctor-{token}"


def _look_at(job: Job, store: Store | None, token: str, meeting: Meeting) -> list[Finding]:
    """The run root as this rank sees it; the meeting is held whatever happens."""
    findings: list[Finding] = []
    expected = f"doctor {token}\n".encode()
    if store is not None:
        findings.append(place.permissions(store, f"rank-{job.rank}"))
        if findings[0].verdict is not Verdict.FAIL:  # else the others would only say the same
            findings.append(place.listings(store, f"listed-{job.rank}"))
            if job.coordinates:
                findings.append(place.conditional_create(store, "race"))
            findings.append(place.store_clock(store, f"clock-{job.rank}"))
        if job.coordinates:
            with suppress(DcpsvcError):  # then the others say so
                store.put(_SHARED, expected)
    job.meet("doctor/shared", None, lambda _: None, meeting)
    if store is not None and job.world_size > 1:
        findings.append(place.shared(store, _SHARED, expected))
    return findings


def _sum_up(plan: Plan, said: list[dict[str, Any]]) -> dict[str, Any]:
    findings = merged([[Finding.from_json(one) for one in each["findings"]] for each in said])
    measured = _slowest([each["measured"] for each in said])
    expected = None
    if measured is not None and plan.model_nbytes is not None:
        copied = all(one.verdict is not Verdict.WARN for one in findings if one.name == machine.MEMORY)
        expected = forecast(measured, plan.model_nbytes, plan.mtbf_s, plan.ranks, copied=copied, step=plan.like)
        findings.append(preemption(expected, plan.grace_s))
    return Examination(
        root=redact(plan.root or str(plan.local)),
        ranks=len(said),
        findings=tuple(findings),
        measured=measured,
        forecast=expected,
    ).to_json()


def preemption(expected: Forecast, grace_s: float) -> Finding:
    """Whether a save fits between SIGTERM and SIGKILL, after one that is under way. Pure."""
    need_s = 2 * expected.local_s
    found = f"{duration(grace_s)} of grace; two local commits take {duration(need_s)}"
    if need_s <= grace_s:
        return ok("preemption", found)
    remedy = (
        "ask the cluster for a longer grace (terminationGracePeriodSeconds, --signal=B:USR1@300), and torchrun "
        "(TORCH_ELASTIC_SHUTDOWN_TIMEOUT), or use more ranks"
    )
    return Finding(name="preemption", verdict=Verdict.WARN, found=found, remedy=remedy)


def _slowest(measured: list[dict[str, Any] | None]) -> Measured | None:
    whole = [one for one in measured if one is not None]
    if not whole or len(whole) < len(measured):
        return None
    smaller = _largest([one["smaller"] for one in whole])
    merged: dict[str, Any] = _largest([one | {"smaller": 0} for one in whole])
    merged |= {"ranks": len(whole), "smaller": smaller}
    return Measured(**merged)


def _largest(said: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: max(one[name] for one in said) for name in said[0]}
