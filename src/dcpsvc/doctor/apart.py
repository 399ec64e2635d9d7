"""Ranks that do not come together, as a finding: without it nobody would hear which of them is missing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch.distributed as dist

from dcpsvc import progress
from dcpsvc.doctor import examination
from dcpsvc.doctor.examination import Examination
from dcpsvc.doctor.findings import Finding, Verdict
from dcpsvc.ranks.rendezvous import DisagreementError
from dcpsvc.storage.names import redact

if TYPE_CHECKING:
    from dcpsvc.doctor.examination import Plan

_REMEDY = "see what the missing ones print, and that their hosts reach MASTER_ADDR and each other (GLOO_SOCKET_IFNAME)"


def examine(plan: Plan) -> tuple[Examination, bool]:
    """As :func:`dcpsvc.doctor.examination.examine`; says whether this rank is the one that speaks."""
    try:
        found, rank = examination.examine(plan)
    except DisagreementError as err:
        who = f"rank {err.missing[0]}" if len(err.missing) == 1 else f"ranks {progress.ranges(err.missing)}"
        parts = [*map(str, err.failures), *([f"{who} did not come within {err.waited_s:.0f} s"] if err.missing else ())]
        return _without(plan, "; ".join(parts)), _rank() == min(err.present, default=0)
    except dist.DistError as err:  # of the launcher's own store, before anything of ours
        return _without(plan, (str(err).splitlines() or [type(err).__name__])[0]), True
    return found, rank == 0


def _without(plan: Plan, said: str) -> Examination:
    return Examination(
        root=redact(plan.root or str(plan.local)),
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
        findings=(Finding(name="ranks", verdict=Verdict.FAIL, found=said, remedy=_REMEDY),),
        measured=None,
        forecast=None,
    )


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
