"""Stage: hold still what this rank writes: copied into an arena, which is the image of the file, or left where it is.

What does not fit into memory a second time is not copied: it goes through a small window while it is written, and
``save()`` returns when that is done. The file is the same, byte for byte.
"""

from __future__ import annotations

import bisect
import errno
import mmap
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.distributed.checkpoint.staging import AsyncStager

from dcpsvc.format import shardfile
from dcpsvc.format.layout import ITEM_NBYTES
from dcpsvc.format.parse import compact
from dcpsvc.state.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    from dcpsvc.format.shardfile import Piece, Placement
    from dcpsvc.state.division import Share


_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
"""A forked data loader worker must not write into its parent's arena."""

_WRITE_NBYTES = 16 << 20


class Reader(Protocol):
    """Whoever an arena is lent to."""

    @property
    def ended(self) -> bool:
        """It reads no more."""
        ...


class Arena:
    """A host buffer that holds one shard at a time and is used again for the next.

    Attributes:
        reader: Who still needs what is in it; None while nobody ever did.
    """

    def __init__(self) -> None:
        self._buffer: mmap.mmap | None = None
        self._tensor = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.reader: Reader | None = None

    @property
    def nbytes(self) -> int:
        """What fits."""
        return self._tensor.numel()

    @property
    def free(self) -> bool:
        """Nobody needs what is in it."""
        return self.reader is None or self.reader.ended

    def reserve(self, nbytes: int) -> torch.Tensor:
        """At least ``nbytes`` of page-aligned bytes as a uint8 tensor; what was in it is void.

        Raises:
            MemoryError: The system does not give them.
        """
        if self.nbytes < nbytes:
            self.release()
            self._buffer = _allocate(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
            self._tensor = torch.frombuffer(self._buffer, dtype=torch.uint8)
        return self._tensor[:nbytes]

    def release(self) -> None:
        """Give the memory back now, whoever still refers to it."""
        if self._buffer is not None:
            self._buffer.madvise(mmap.MADV_DONTNEED)
        self._buffer, self._tensor = None, torch.empty(0, dtype=torch.uint8, device="cpu")


@dataclass(frozen=True, slots=True)
class Tight:
    """There is no arena: this much memory is all there is."""

    spare_nbytes: int


class Arenas:
    """This rank's arenas: one for each save that is not on disk yet.

    Args:
        budget_nbytes: For all of them together; None asks ``free_nbytes``.
        at_most: How many there may be: a disk that hangs keeps the arena it reads.
        free_nbytes: What could still be allocated now; None where nobody knows.
    """

    def __init__(self, budget_nbytes: int | None, at_most: int, free_nbytes: Callable[[], int | None]) -> None:
        self._budget_nbytes, self._at_most, self._free_nbytes = budget_nbytes, at_most, free_nbytes
        self._arenas: list[Arena] = []

    @property
    def nbytes(self) -> int:
        """Held by all of them."""
        return sum(arena.nbytes for arena in self._arenas)

    def take(self, nbytes: int) -> Arena | Tight:
        """A free arena that holds ``nbytes``: one that was used before, or a new one.

        Raises:
            TimeoutError: The saves before are still being written, all that may be.
        """
        free = [arena for arena in self._arenas if arena.free]
        if fitting := [arena for arena in free if arena.nbytes >= nbytes]:
            return min(fitting, key=lambda arena: arena.nbytes)
        for arena in free:
            self._arenas.remove(arena)
            arena.release()
        if len(self._arenas) >= self._at_most:
            raise TimeoutError(f"the local disk has not taken the {len(self._arenas)} shards before this one")
        return self._make(nbytes)

    def _make(self, nbytes: int) -> Arena | Tight:
        spare = self._free_nbytes() if self._budget_nbytes is None else self._budget_nbytes - self.nbytes
        if spare is not None and nbytes > spare:
            return Tight(max(spare, 0))
        arena = Arena()
        try:
            arena.reserve(nbytes)
        except MemoryError:
            return Tight(0)
        self._arenas.append(arena)
        return arena


class Outline:
    """What one rank writes for one attempt; nothing is copied yet.

    Attributes:
        placement: Where each piece lies in the file.
        sources: The tensors, or views of them, by their name in the file.
        header: The file's first bytes.
        objects: Its JSON documents.
        nbytes: Of the file up to its block table.
    """

    def __init__(self, shares: Sequence[Share], documents: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        self.placement: Placement = shardfile.place(share.piece for share in shares)
        self.sources = {share.piece.name: share.source for share in shares}
        self.objects = compact(documents)
        self.header = shardfile.header(self.placement, len(self.objects), metadata)
        self.nbytes = self.placement.tensors_end + len(self.objects)


class Staged(Protocol):
    """One rank's part of one step, ready to be written."""

    @property
    def nbytes(self) -> int:
        """Of the file up to its block table."""
        ...

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What DCP is given: the pieces, by their name in the file."""
        ...

    def stage(self) -> None:
        """Do what must be done on the training thread."""
        ...

    def parts(self, resolve: Callable[[str], torch.Tensor]) -> Generator[memoryview]:
        """The file up to its block table, in pieces of whole blocks; each is valid until the next is asked for."""
        ...


class Snapshot:
    """Copied into an arena: the state may change as soon as :meth:`stage` returns.

    Attributes:
        nbytes: Of the file up to its block table.
        tensors: The pieces in the arena.
        arena: Which.
    """

    def __init__(self, outline: Outline, arena: Arena) -> None:
        self._outline, self.arena, self._host = outline, arena, arena.reserve(outline.nbytes)
        self.nbytes = outline.nbytes
        self.tensors = self._views(outline.placement)

    @property
    def image(self) -> memoryview:
        """The bytes to write, valid until the arena is used again."""
        return self._host.numpy().data

    def stage(self) -> None:
        """Copy every tensor straight to its place in the file."""
        outline = self._outline
        for name, view in self.tensors.items():
            view.copy_(outline.sources[name])
        outline.sources.clear()
        self._fill(0, outline.header)
        self._fill(outline.placement.tensors_end, outline.objects)

    def parts(self, resolve: Callable[[str], torch.Tensor]) -> Generator[memoryview]:
        """The image as it lies."""
        del resolve  # every piece is at its place already
        for begin in range(0, self.nbytes, _WRITE_NBYTES):
            yield self.image[begin : begin + _WRITE_NBYTES]

    def _views(self, placement: Placement) -> dict[str, torch.Tensor]:
        views: dict[str, torch.Tensor] = {}
        for piece, begin in zip(placement.pieces, placement.begins, strict=True):
            flat = self._host[begin : begin + piece.nbytes].view(dtype_of(piece.dtype))
            views[piece.name] = flat.view(piece.sizes)
        return views

    def _fill(self, begin: int, data: bytes) -> None:
        self.image[begin : begin + len(data)] = data


class Stream:
    """Left where it is: the state must not change before the file is written, window by window.

    Attributes:
        nbytes: Of the file up to its block table.
        tensors: The pieces where the training has them; forgotten once they are written.
    """

    def __init__(self, outline: Outline, window_nbytes: int) -> None:
        self._outline, self._window_nbytes = outline, window_nbytes
        self.nbytes, self.tensors = outline.nbytes, outline.sources

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
            self.tensors.clear()
            arena.release()

    def _fill(self, part: torch.Tensor, begin: int, resolve: Callable[[str], torch.Tensor]) -> None:
        """Bytes ``[begin, begin + len(part))`` of the file."""
        outline, end = self._outline, begin + part.numel()
        for at, data in ((0, outline.header), (outline.placement.tensors_end, outline.objects)):
            low, high = max(at, begin), min(at + len(data), end)
            if low < high:
                part.numpy()[low - begin : high - begin].data[:] = data[low - at : high - at]
        for piece, at in _between(outline.placement, begin, end):
            low, high = max(at, begin), min(at + piece.nbytes, end)
            if low < high:
                flat = part[low - begin : high - begin].view(dtype_of(piece.dtype))
                copy_elements(flat, resolve(piece.name), (low - at) // ITEM_NBYTES[piece.dtype])


class Gate(AsyncStager):
    """DCP's staging seam: stages at once, and lets DCP go on only when the ranks have agreed.

    DCP plans and writes once the future resolves, so a rank that is missing, failed or disagrees costs a clean error
    here and never a half-written shard. Opened or refused, whichever comes first.
    """

    def __init__(self, staged: Staged) -> None:
        self._staged = staged
        self._result: Future[dict[str, Any]] = Future()
        self._lock = threading.Lock()

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Nothing is left to wait for: what can be done here is done when ``stage`` returns."""
        return False

    def stage(self, state_dict: dict[str, Any]) -> Future[dict[str, Any]]:
        """Called by ``async_save`` on the training thread."""
        del state_dict  # what is staged knows which part of it this rank writes
        self._staged.stage()
        return self._result

    def open(self) -> None:
        """Every rank has arrived and agrees: let DCP write."""
        with self._lock:
            if not self._result.done():
                self._result.set_result(self._staged.tensors)

    def refuse(self, error: BaseException) -> None:
        """The save has ended before a byte was written."""
        with self._lock:
            if not self._result.done():
                self._staged.tensors.clear()
                self._result.set_exception(error)

    def synchronize_staging(self) -> None:
        """Part of DCP's older protocol; see :attr:`should_synchronize_after_execute`."""

    def close(self) -> None:
        """The arena belongs to the Checkpointer."""


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


def _between(placement: Placement, begin: int, end: int) -> Iterator[tuple[Piece, int]]:
    """Pieces that may have bytes in a range, and where they begin."""
    first = max(0, bisect.bisect_right(placement.begins, begin) - 1)
    last = bisect.bisect_left(placement.begins, end)
    return zip(placement.pieces[first:last], placement.begins[first:last], strict=True)


def _allocate(nbytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, nbytes, flags=_PRIVATE)
    except OSError as err:
        if err.errno == errno.ENOMEM:
            raise MemoryError(f"{nbytes} bytes for an arena") from err
        raise
