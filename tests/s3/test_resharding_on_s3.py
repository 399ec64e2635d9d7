"""R30 from a real server: other numbers of ranks, FSDP2 and DDP, on empty disks, resume exactly what was saved."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import dcpsvc
from tests.ranks.harness import run_ranks, values
from tests.ranks.models import Training, checkpointer

if TYPE_CHECKING:
    from pathlib import Path

    from tests.s3.servers import Server

pytestmark = pytest.mark.timeout(200)

WIDTH = 15
"""Divides by neither 2, 3, 4 nor 8."""


def save(rank: int, world: int, root: str, local: Path, *, kind: str, options: dict[str, Any]) -> dict[str, str]:
    training = Training(kind, rank, width=WIDTH)
    training.train(3)
    with checkpointer(root, training.state, store=root, local=local, storage_options=options) as ckpt:
        ckpt.save(3).wait(60)
    return training.fingerprint()


def resume(rank: int, world: int, root: str, local: Path, *, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """What came back, from where; and it can go on."""
    training, told = Training(kind, rank, seed=5, width=WIDTH), list[Any]()
    with checkpointer(
        root, training.state, store=root, local=local / str(rank), storage_options=options, save_last=False,
        on_event=told.append,
    ) as ckpt:  # fmt: skip
        assert ckpt.resume() == 3
        prints = training.fingerprint()
        training.train(1)
    detail = next(event.detail for event in told if event.name == dcpsvc.Point.RESUMED)
    return {"prints": prints, "detail": detail, "owner": training.loader.owner}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "world", "others"),
    [("fsdp", 4, [("fsdp", 3), ("fsdp", 8), ("plain", 0), ("ddp", 2)]), ("ddp", 2, [("fsdp", 3)])],
    ids=["FSDP2 on 4", "DDP on 2"],
)
def test_any_number_of_ranks_resumes_exactly_what_fsdp2_or_ddp_has_saved_to_a_real_server(
    s3_server: Server, run_root: str, tmp_path: Path, *, kind: str, world: int, others: list[tuple[str, int]]
) -> None:
    options = s3_server.storage_options
    saved = values(run_ranks(world, partial(save, kind=kind, options=options), run_root, tmp_path / "saved"))[0]
    for number, (other, ranks) in enumerate(others):
        there = partial(resume, kind=other, options=options)
        for rank, found in enumerate(values(run_ranks(ranks, there, run_root, tmp_path / f"disks-{number}"))):
            assert found["prints"] == saved, (other, ranks)
            assert found["owner"] == rank % world
            assert "from the run root" in found["detail"]
            assert "from local disks" not in found["detail"]
