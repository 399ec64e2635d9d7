"""What happens to a resume while the server dies, or the credentials end: all of the state, or none of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import dcpsvc
from dcpsvc.errors import DcpsvcError
from tests.s3 import spoiling as faults

if TYPE_CHECKING:
    from pathlib import Path

    from tests.s3.servers import Server
    from tests.s3.spoiling import Proxy, Spoiler

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

READS = "^GET .*rank-"
NUMEL = 12 * 2**20


@pytest.fixture
def saved(s3_server: Server, run_root: str, tmp_path: Path) -> dict[str, Any]:
    """Two commits at the run root; what the newer one holds."""
    generator = torch.Generator().manual_seed(0)
    state = {"w": torch.randint(0, 256, (4, NUMEL), dtype=torch.uint8, generator=generator)}
    with dcpsvc.Checkpointer(
        run_root, state, local=tmp_path / "writer", storage_options=s3_server.storage_options, save_last=False
    ) as ckpt:
        ckpt.save(1).wait(100)
        state["w"].add_(1)
        ckpt.save(2).wait(100)
    return state


@pytest.fixture
def reader(options: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """How a job on other disks opens it."""
    return {"local": tmp_path / "reader", "storage_options": options, "save_last": False}


def fresh() -> dict[str, Any]:
    return {"w": torch.zeros(4, NUMEL, dtype=torch.uint8)}


def test_a_server_killed_during_a_resume_and_started_again_gives_the_whole_state(
    s3_server: Server, saved: dict[str, Any], reader: dict[str, Any], run_root: str, between: Proxy
) -> None:
    s3_server.skip_unless_ours()

    def kills_the_server(spoiler: Spoiler) -> None:
        s3_server.stop("KILL")
        try:
            spoiler.reset()
        finally:
            s3_server.start()

    between.spoil(READS, faults.passes, 2)
    between.spoil(READS, kills_the_server)
    state = fresh()
    with dcpsvc.Checkpointer(run_root, state, **reader) as ckpt:
        assert ckpt.resume() == 2
    assert between.left == 0
    assert torch.equal(state["w"], saved["w"])


@pytest.mark.parametrize("code", ["ExpiredToken", "RequestTimeTooSkewed"])
def test_credentials_that_end_during_a_resume_end_it_at_once_with_a_sentence_and_an_untouched_state(
    saved: dict[str, Any], reader: dict[str, Any], run_root: str, between: Proxy, code: str
) -> None:
    state = fresh()
    with dcpsvc.Checkpointer(run_root, state, **reader) as ckpt:
        between.spoil(READS, faults.passes, 2)
        between.spoil(READS, faults.says(403, code), 1000)
        with pytest.raises(DcpsvcError, match=r"session token has expired|clock"):
            ckpt.resume()
        refused = [line for line in between.spoiled if line.startswith("GET")]
        assert len(refused) < 60, "it went on asking"
        assert not state["w"].any()
        between.calm()
        assert ckpt.resume() == 2
    assert torch.equal(state["w"], saved["w"])


def test_credentials_that_end_during_a_load_end_it_alike(
    saved: dict[str, Any], run_root: str, options: dict[str, Any], between: Proxy
) -> None:
    state = fresh()
    between.spoil(READS, faults.passes, 2)
    between.spoil(READS, faults.says(403, "ExpiredToken"), 1000)
    with pytest.raises(DcpsvcError, match="session token has expired"):
        dcpsvc.load(run_root, state, storage_options=options)
    assert not state["w"].any()
