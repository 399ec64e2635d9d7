"""Stage: hold still what this rank writes: copied into an arena, which is the image of the file, or left where it is.

What does not fit into memory a second time is not copied: it goes through a small window while it is written, and
``save()`` returns when that is done. The file is the same, byte for byte.
"""

from __future__ import annotations

import bisect
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.distributed.checkpoint.staging import AsyncStager

from dcpsvc.arena import Arena
from dcpsvc.format import shardfile
from dcpsvc.format.layout import ITEM_NBYTES
from dcpsvc.format.parse import compact
from dcpsvc.state.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    from dcpsvc.format.shardfile import Piece, Placement

_WRITE_NBYTES = 64 << 20
"""Written by one call. A busy training thread gives the interpreter back after 5 ms, which is 16 MiB of disk time."""

_BATCH = 4096
_BATCH_NBYTES = 256 << 20
"""At most so much is copied by one call, so that a Ctrl-C is heard."""


# Private in name, and what torch's own optimizers and FSDP2 are made of.
_copy = torch._foreach_copy_  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


class Outline:
    """What one rank writes for one attempt; nothing is copied yet.

    Attributes:
        placement: Where each piece lies in the file.
        sources: The tensors, or views of them, in the order of the file. Their dtype may be another than the file's.
        header: The file's first bytes.
        objects: Its JSON documents.
        nbytes: Of the file up to its block table.
    """

    def __init__(
        self,
        placement: Placement,
        sources: Sequence[torch.Tensor],
        documents: Mapping[str, Any],
        metadata: Mapping[str, str],
    ) -> None:
        self.placement, self.sources = placement, list(sources)
        self.objects = compact(documents)
        self.header = shardfile.header(placement, len(self.objects), metadata)
        self.nbytes = placement.tensors_end + len(self.objects)


class Staged(Protocol):
    """One rank's part of one step, ready to be written."""

    @property
    def nbytes(self) -> int:
        """Of the file up to its block table."""
        ...

    @property
    def given(self) -> dict[str, torch.Tensor]:
        """What DCP is given as its state dict. Never piece by piece: DCP logs twice for each entry, 30 us in all."""
        ...

    def piece(self, name: str) -> torch.Tensor:
        """A piece by its name in the file."""
        ...

    def stage(self) -> None:
        """Do what must be done on the training thread."""
        ...

    def forget(self) -> None:
        """Let go of the state: nothing of it will be written."""
        ...

    def parts(self, resolve: Callable[[str], torch.Tensor]) -> Generator[memoryview]:
        """The file up to its block table, in pieces of whole blocks; each is valid until the next is asked for."""
        ...


class Snapshot:
    """Copied into an arena: the state may change as soon as :meth:`stage` returns.

    Attributes:
        nbytes: Of the file up to its block table.
        arena: Where to.
    """

    def __init__(self, outline: Outline, arena: Arena) -> None:
        self._outline, self.arena, self._host = outline, arena, arena.reserve(outline.nbytes)
        self._views = arena.cut(outline.placement)
        self.nbytes = outline.nbytes

    @property
    def image(self) -> memoryview:
        """The bytes to write, valid until the arena is used again."""
        return self._host.numpy().data

    @property
    def given(self) -> dict[str, torch.Tensor]:
        """The image of the file."""
        return {"image": self._host}

    def piece(self, name: str) -> torch.Tensor:
        """A piece in the arena."""
        return self._views[self._outline.placement.names.index(name)]

    def stage(self) -> None:
        """Copy every tensor straight to its place in the file."""
        outline = self._outline
        with torch.no_grad():
            for batch in _batches(outline.placement):
                # Small tensors cost a microsecond each so, and large ones are copied as fast as alone.
                _copy(self._views[batch], outline.sources[batch])
        self.forget()
        self._fill(0, outline.header)
        self._fill(outline.placement.tensors_end, outline.objects)

    def forget(self) -> None:
        """The copy is all that is needed."""
        self._outline.sources.clear()

    def parts(self, resolve: Callable[[str], torch.Tensor]) -> Generator[memoryview]:
        """The image as it lies."""
        del resolve  # every piece is at its place already
        for begin in range(0, self.nbytes, _WRITE_NBYTES):
            yield self.image[begin : begin + _WRITE_NBYTES]

    def _fill(self, begin: int, data: bytes) -> None:
        self.image[begin : begin + len(data)] = data


class Stream:
    """Left where it is: the state must not change before the file is written, window by window.

    Attributes:
        nbytes: Of the file up to its block table.
        tensors: The pieces where the training has them, by name; forgotten once they are written.
        given: Nothing: what DCP holds on to would be held for too long.
    """

    def __init__(self, outline: Outline, window_nbytes: int) -> None:
        self._outline, self._window_nbytes = outline, window_nbytes
        self.tensors = dict(zip(outline.placement.names, outline.sources, strict=True))
        self.nbytes, self.given = outline.nbytes, dict[str, torch.Tensor]()
        outline.sources.clear()

    def piece(self, name: str) -> torch.Tensor:
        """A piece of the state."""
        return self.tensors[name]

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
        for at, data in ((0, outline.header), (outline.placement.tensors_end, outline.objects)):
            low, high = max(at, begin), min(at + len(data), end)
            if low < high:
                part.numpy()[low - begin : high - begin].data[:] = data[low - at : high - at]
        for name, piece, at in _between(outline.placement, begin, end):
            low, high = max(at, begin), min(at + piece.nbytes, end)
            if low < high:
                flat = part[low - begin : high - begin].view(dtype_of(piece.dtype))
                copy_elements(flat, resolve(name), (low - at) // ITEM_NBYTES[piece.dtype])


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
                self._result.set_result(self._staged.given)

    def refuse(self, error: BaseException) -> None:
        """The save has ended before a byte was written."""
        with self._lock:
            if not self._result.done():
                self._staged.forget()
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


def _between(placement: Placement, begin: int, end: int) -> Iterator[tuple[str, Piece, int]]:
    """Pieces that may have bytes in a range: their names, and where they begin."""
    first = max(0, bisect.bisect_right(placement.begins, begin) - 1)
    last = bisect.bisect_left(placement.begins, end)
    among = slice(first, last)
    return zip(placement.names[among], placement.pieces[among], placement.begins[among], strict=True)


def _batches(placement: Placement) -> Iterator[slice]:
    """All pieces in file order, some at a time."""
    begins, first = placement.begins, 0
    while first < len(begins):
        within = bisect.bisect_right(begins, begins[first] + _BATCH_NBYTES)
        last = min(within, first + _BATCH)
        yield slice(first, last)
        first = last
