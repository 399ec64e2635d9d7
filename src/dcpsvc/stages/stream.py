"""Stream: what does not fit into memory a second time goes through a small window while it is written.

``save()`` returns when that is done. The file is the same, byte for byte, as if it had been staged.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

import torch

from dcpsvc.arena import Arena
from dcpsvc.format.layout import ITEM_NBYTES
from dcpsvc.state.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from dcpsvc.format.shardfile import Piece, Placement
    from dcpsvc.outline import Outline


class Stream:
    """Left where it is: the state must not change before the file is written, window by window.

    Attributes:
        nbytes: Of the file up to its block table.
        tensors: The pieces where the training has them, by name; forgotten once they are written.
        given: Nothing: what DCP holds on to would be held for too long.
    """

    lasting = False

    def __init__(self, outline: Outline, window_nbytes: int) -> None:
        self._outline, self._window_nbytes = outline, window_nbytes
        self.tensors = dict(zip(outline.placement.names, outline.sources, strict=True))
        self.nbytes, self.given = outline.nbytes, dict[str, torch.Tensor]()
        outline.forget()

    def piece(self, name: str) -> torch.Tensor:
        """A piece of the state.

        Raises:
            InterruptedError: The save has ended.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise InterruptedError("the save ended while its shard was being written") from None

    def forget(self) -> None:
        """Whatever becomes of the state, it is not read any more."""
        self.tensors.clear()

    def stage(self) -> None:
        """Let what the training has begun on its devices end: another thread, on another stream, is going to read."""
        for device in {tensor.device for tensor in self.tensors.values()}:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)

    def parts(self, resolve: Callable[[str], torch.Tensor]) -> Generator[memoryview]:
        """Fill the window anew for each part, in the order of the file."""
        arena = Arena()
        try:
            window = arena.reserve(min(self._window_nbytes, self.nbytes))
            for begin in range(0, self.nbytes, self._window_nbytes):
                part = window[: min(self._window_nbytes, self.nbytes - begin)]
                self._fill(part, begin, resolve)
                yield part.numpy().data
        finally:
            self.forget()
            arena.release()

    def _fill(self, part: torch.Tensor, begin: int, resolve: Callable[[str], torch.Tensor]) -> None:
        """Bytes ``[begin, begin + len(part))`` of the file."""
        outline, end = self._outline, begin + part.numel()
        placement = outline.placement
        for at, data in ((0, outline.header), placement.padding, (placement.tensors_end, outline.objects)):
            low, high = max(at, begin), min(at + len(data), end)
            if low < high:
                part.numpy()[low - begin : high - begin].data[:] = data[low - at : high - at]
        for name, piece, at in _between(outline.placement, begin, end):
            low, high = max(at, begin), min(at + piece.nbytes, end)
            if low < high:
                flat = part[low - begin : high - begin].view(dtype_of(piece.dtype))
                copy_elements(flat, resolve(name), (low - at) // ITEM_NBYTES[piece.dtype])


def copy_elements(flat: torch.Tensor, source: torch.Tensor, begin: int) -> None:
    """Fill ``flat`` with the elements of ``source`` from ``begin`` on, counted row major, whatever its strides are.

    Only what is asked for is copied: a source that is not contiguous, or on a device, is never made whole elsewhere.
    """
    count = flat.numel()
    if count == source.numel():
        flat.view(source.shape).copy_(source)
        return
    row = source.numel() // source.shape[0]
    first, inside = divmod(begin, row)
    done = min(row - inside, count) if inside else 0
    if done:
        copy_elements(flat[:done], source[first], inside)
        first += 1
    if rows := (count - done) // row:
        whole = flat[done : done + rows * row]
        whole.view(rows, *source.shape[1:]).copy_(source[first : first + rows])
    if rest := (count - done) % row:
        copy_elements(flat[count - rest :], source[first + rows], 0)


def _between(placement: Placement, begin: int, end: int) -> Iterator[tuple[str, Piece, int]]:
    """Pieces that may have bytes in a range: their names, and where they begin."""
    first = max(0, bisect.bisect_right(placement.begins, begin) - 1)
    last = bisect.bisect_left(placement.begins, end)
    among = slice(first, last)
    return zip(placement.names[among], placement.pieces[among], placement.begins[among], strict=True)
