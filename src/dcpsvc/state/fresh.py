"""New host memory for what is read, in huge pages where the kernel has them: small ones take longer than the reading.

It is torch's own memory, so a tensor in it is one like any other, and is given back by itself.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING

import torch

from dcpsvc import linux

if TYPE_CHECKING:
    from collections.abc import Sequence

_LEAST_NBYTES = 4 << 20
"""Smaller ones may have no whole huge page in them, wherever they begin."""


def empty(sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As :func:`torch.empty` on the host: anything may be in it."""
    made = torch.empty(tuple(sizes), dtype=dtype, device="cpu")
    if type(made) is torch.Tensor and made.nbytes >= _LEAST_NBYTES:
        begin = -(-made.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (made.data_ptr() + made.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        with contextlib.suppress(OSError):  # a kernel without it
            linux.madvise(begin, end - begin, linux.MADV_HUGEPAGE)
    return made
