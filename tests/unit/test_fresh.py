"""New memory for what is read: huge pages are asked for, and a tensor is one like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcpsvc.state import fresh

_MAPPINGS = Path("/proc/self/smaps")


def flags(address: int) -> list[str]:
    """Of the mapping that an address is in."""
    inside = False
    for line in _MAPPINGS.read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            inside = low <= address < high
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    return []


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
def test_huge_pages_are_asked_for_from_one_end_of_a_large_tensor_to_the_other() -> None:
    made = fresh.empty((16, 1 << 20), torch.float32)
    ends = made.data_ptr() + (1 << 12), made.data_ptr() + made.nbytes - (1 << 13)
    assert all("hg" in flags(address) for address in ends)


@pytest.mark.parametrize("sizes", [(), (0,), (3, 5), (1 << 20,), (3 << 19, 3)])
def test_it_has_the_extent_and_the_dtype_that_were_asked_for(sizes: tuple[int, ...]) -> None:
    made = fresh.empty(sizes, torch.float64).fill_(2)
    assert tuple(made.shape) == sizes
    assert made.dtype == torch.float64
    assert bool((made == 2).all())


def test_it_can_grow_like_any_tensor() -> None:
    made = fresh.empty((1 << 21,), torch.float32).fill_(3)
    made.resize_(1 << 22)
    assert bool((made[: 1 << 21] == 3).all())
