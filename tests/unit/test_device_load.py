"""What is loaded onto a device whose memory the host cannot write gets there by copies, whole, and in bands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dcpsvc
from dcpsvc import bands
from tests.unit.on_a_device import OnADevice
from tests.unit.one_process import save

if TYPE_CHECKING:
    from pathlib import Path

ROWS, WIDTH = 1000, 300


@pytest.fixture
def saved(tmp_path: Path) -> torch.Tensor:
    value = torch.rand(ROWS, WIDTH)
    save(tmp_path, {"w": value})
    return value


def test_plain_dcp_load_fills_a_tensor_of_a_device_band_by_band(
    tmp_path: Path, saved: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bands, "_BAND_NBYTES", 100 * WIDTH * 4)
    target = OnADevice(torch.zeros(ROWS, WIDTH))
    dcp.load({"w": target}, storage_reader=dcpsvc.storage_reader(tmp_path / "root"), no_dist=True)
    assert torch.equal(target.held, saved)
    assert target.copies == [100 * WIDTH * 4] * 10


def test_load_fills_a_tensor_of_a_device_by_one_copy_of_what_was_proven(tmp_path: Path, saved: torch.Tensor) -> None:
    target = OnADevice(torch.zeros(ROWS, WIDTH))
    dcpsvc.load(tmp_path / "root", {"w": target})
    assert torch.equal(target.held, saved)
    assert target.copies == [saved.nbytes]
