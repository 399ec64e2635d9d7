"""New host memory for what is read, in huge pages where the kernel gives them: touching it costs a third."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from dcpsvc import linux

if TYPE_CHECKING:
    from collections.abc import Sequence

_HUGE_NBYTES = 2 << 20


def empty(sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As :func:`torch.empty`: anything may be in it."""
    made = torch.empty(tuple(sizes), dtype=dtype)
    if made.nbytes >= 2 * _HUGE_NBYTES and type(made) is torch.Tensor and made.device.type == "cpu":
        skipped = -made.data_ptr() % _HUGE_NBYTES
        nbytes = (made.nbytes - skipped) // _HUGE_NBYTES * _HUGE_NBYTES
        with contextlib.suppress(OSError):  # a kernel without it
            linux.madvise(made.data_ptr() + skipped, nbytes, linux.MADV_HUGEPAGE)
    return made
