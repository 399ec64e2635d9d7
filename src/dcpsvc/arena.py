"""Arenas: host memory that holds one shard at a time, as the image of its file, and is used again for the next.

Page-aligned, so that it can be written around the page cache; touched when it is made, so that the first copy into it
is as fast as the tenth; in huge pages where the kernel gives them: touching them and writing from them costs a fifth.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dcpsvc import linux
from dcpsvc.state.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.format.shardfile import Placement

_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_HUGE_NBYTES = 2 << 20
_TOUCH_NBYTES = 256 << 20
"""Touched at once: in between others may change the address space, and the making may be called off."""

_PORTABLE = 1
"""Pinned for every context of the process."""

_SPARE_FRACTION = 16
"""An arena has addresses for a sixteenth more than it was made for; memory only when a shard has grown into them."""


class Reader(Protocol):
    """Whoever an arena is lent to."""

    @property
    def ended(self) -> bool:
        """It reads no more."""
        ...


class Arena:
    """A host buffer that holds one shard at a time and is used again for the next.

    Attributes:
        nbytes: What has memory.
        reader: Who still needs what is in it; None while nobody ever did.
    """

    def __init__(self) -> None:
        self._buffer: mmap.mmap | None = None
        self._whole = _nothing()
        self._cut: tuple[Placement, list[torch.Tensor]] | None = None
        self._pinned = False
        self.nbytes = 0
        self.reader: Reader | None = None

    @property
    def capacity_nbytes(self) -> int:
        """What it could hold without moving."""
        return self._whole.numel()

    @property
    def free(self) -> bool:
        """Nobody needs what is in it."""
        return self.reader is None or self.reader.ended

    def reserve(self, nbytes: int, wanted: Callable[[], bool] = lambda: True) -> torch.Tensor:
        """At least ``nbytes`` of page-aligned, touched bytes as a uint8 tensor; what was in it is void.

        Args:
            nbytes: How many.
            wanted: Asked now and then; touching stops when it says no, and the copy does the rest.

        Raises:
            MemoryError: The system does not give them.
        """
        if self.capacity_nbytes < nbytes:
            self.release()
            self._allocate(nbytes)
        while self.nbytes < nbytes and wanted():
            self._unpin()
            count = min(-(-(nbytes - self.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE, _TOUCH_NBYTES)
            _touch(self._whole[self.nbytes : self.nbytes + count])
            self.nbytes += count
        return self._whole[:nbytes]

    def cut(self, placement: Placement) -> list[torch.Tensor]:
        """The pieces of a shard as tensors in this arena, in file order; the same ones as long as it is not moved."""
        if self._cut is None or self._cut[0] is not placement:
            whole = self.reserve(placement.tensors_end)
            self._cut = (
                placement,
                [
                    whole[begin : begin + piece.nbytes].view(dtype_of(piece.dtype)).view(piece.sizes)
                    for piece, begin in zip(placement.pieces, placement.begins, strict=True)
                ],
            )
        return self._cut[1]

    def pin(self, device: torch.device) -> bool:
        """Let an accelerator's copy engine reach it; where that fails, copies are slower and no less right.

        Args:
            device: Which; its context is used, and no other is made.

        Returns:
            Whether it can.
        """
        if self._pinned or not self.nbytes:
            return True
        if device.type != "cuda" or not torch.cuda.is_available():
            return False  # torch can register memory that is not its own with CUDA and ROCm only
        runtime: Any = torch.cuda.cudart()
        with torch.cuda.device(device):
            refused = int(runtime.cudaHostRegister(self._whole.data_ptr(), self.nbytes, _PORTABLE))
            if refused:  # the next call of CUDA, whoever makes it, would report that as its own
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device=device)
        self._pinned = not refused
        return self._pinned

    def release(self) -> None:
        """Give the memory back now, whoever still refers to it."""
        self._unpin()
        if self._buffer is not None:
            linux.madvise(self._whole.data_ptr(), self._whole.numel(), mmap.MADV_DONTNEED)
        self._buffer, self._whole, self._cut, self.nbytes = None, _nothing(), None, 0

    def _unpin(self) -> None:
        if self._pinned:
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(self._whole.data_ptr())
            self._pinned = False

    def _allocate(self, nbytes: int) -> None:
        capacity = -(-(nbytes + nbytes // _SPARE_FRACTION) // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._buffer = mmap.mmap(-1, capacity + _HUGE_NBYTES, flags=_PRIVATE)
        except (OSError, OverflowError) as err:
            if not isinstance(err, OverflowError) and err.errno != errno.ENOMEM:
                raise
            raise MemoryError(f"{nbytes} bytes for an arena") from err
        mapped = torch.frombuffer(self._buffer, dtype=torch.uint8)
        begin = -mapped.data_ptr() % _HUGE_NBYTES
        self._whole = mapped[begin : begin + capacity]
        # A forked data loader worker sees zeros, so the next copy has no pages to separate from it first.
        for advice in (linux.MADV_HUGEPAGE, linux.MADV_WIPEONFORK):
            with contextlib.suppress(OSError):  # a kernel without it
                linux.madvise(self._whole.data_ptr(), capacity, advice)


def _nothing() -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu")


def _touch(part: torch.Tensor) -> None:
    """Have the kernel give the memory now. Other threads run meanwhile.

    Raises:
        MemoryError: It has none.
    """
    try:
        linux.madvise(part.data_ptr(), part.numel(), linux.MADV_POPULATE_WRITE)
    except OSError as err:
        if err.errno == errno.ENOMEM:
            raise MemoryError(f"{part.numel()} bytes for an arena") from err
        part[:: mmap.PAGESIZE] = 0  # Linux before 5.14
