"""New memory for what is read: huge pages where there are any, and a tensor like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcpsvc.state import fresh

_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_kib(address: int) -> int:
    """Of the mapping that an address is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            inside = low <= address < high
        elif inside and head == "AnonHugePages:":
            return int(line.split()[1])
    return 0


@pytest.mark.skipif("[never]" in (_SWITCH.read_text() if _SWITCH.exists() else "[never]"), reason="no huge pages here")
def test_a_large_tensor_is_in_huge_pages() -> None:
    made = fresh.empty((16, 1 << 20), torch.float32).fill_(1)
    assert huge_kib(made.data_ptr() + made.nbytes // 2) >= 32 << 10


@pytest.mark.parametrize("sizes", [(), (0,), (3, 5), (1 << 20,), (3 << 19, 3)])
def test_it_has_the_extent_and_the_dtype_that_were_asked_for(sizes: tuple[int, ...]) -> None:
    made = fresh.empty(sizes, torch.float64).fill_(2)
    assert tuple(made.shape) == sizes
    assert made.dtype == torch.float64
    assert bool((made == 2).all())
