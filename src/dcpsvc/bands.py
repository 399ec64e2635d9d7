"""Bands: rows of a saved chunk on their way to a box that they do not fit as they are.

A box that cuts rows, lies on a device or has another dtype is filled through host memory of our own, a band of rows at
a time. A band has memory from its first byte to its last only.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import torch

from dcpsvc.state import boxes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_BAND_NBYTES = 8 << 20


def bands(place: boxes.Place, offsets: Sequence[int], lengths: Sequence[int], target: torch.Tensor) -> Iterator[Band]:
    """What fills ``target`` with a box of a chunk.

    Args:
        place: Where the chunk lies.
        offsets: Of the box, in the chunk.
        lengths: Its extent.
        target: Of that extent; any device, any strides.
    """
    first, rows = (offsets[0], lengths[0]) if offsets else (0, 1)
    step = max(1, _BAND_NBYTES // max(place.row_nbytes, 1))
    for row in range(0, rows, step):
        count = min(step, rows - row)
        part = target.narrow(0, row, count) if offsets else target
        yield Band(place, first + row, count, (tuple(offsets[1:]), tuple(lengths[1:])), part)


def await_streams(targets: Iterable[torch.Tensor]) -> None:
    """Have all be done that this thread's streams were given: bands are copied by threads that have others.

    Else a ``zeros()`` that is still to run on a stream of the caller's would come after the bytes.
    """
    for device in {target.device for target in targets if not target.is_cpu}:
        with contextlib.suppress(RuntimeError, ValueError):  # no streams there
            torch.accelerator.current_stream(device).synchronize()


class Band:
    """Some whole rows of a chunk, and the part of a tensor that a part of each goes to. A sink; any thread.

    Args:
        place: Where the chunk lies.
        row: The first.
        count: How many.
        cut: Offsets and lengths in the other dimensions.
        target: Filled when the last byte has come.
    """

    def __init__(
        self,
        place: boxes.Place,
        row: int,
        count: int,
        cut: tuple[tuple[int, ...], tuple[int, ...]],
        target: torch.Tensor,
    ) -> None:
        self.begin = place.begin + row * place.row_nbytes
        self.end = self.begin + count * place.row_nbytes
        self._place, self._count, self._cut, self._target = place, count, cut, target
        self._missing = self.end - self.begin
        self._memory: memoryview | None = None
        self._lock = threading.Lock()

    @property
    def view(self) -> memoryview:
        """Memory for all rows."""
        with self._lock:
            if self._memory is None:
                self._memory = memoryview(bytearray(self.end - self.begin))
            return self._memory

    def put(self, begin: int, proven: memoryview) -> None:
        """By a copy; the last one also goes where it belongs."""
        self.view[begin - self.begin : begin - self.begin + len(proven)] = proven
        self.filled(len(proven))

    def filled(self, nbytes: int) -> None:
        """So many bytes more are there; with the last one they go where they belong."""
        with self._lock:
            self._missing -= nbytes
            if self._missing:
                return
            memory, self._memory = self._memory, None
        assert memory is not None  # noqa: S101 - somebody has filled it
        sizes = (self._count, *self._place.sizes[1:]) if self._place.sizes else ()
        part = boxes.as_tensor(memory, self._place.dtype, sizes)
        for dim, (offset, length) in enumerate(zip(*self._cut, strict=True), 1):
            part = part.narrow(dim, offset, length)
        self._target.copy_(part)
