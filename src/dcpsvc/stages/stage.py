"""Stage: hold still what this rank writes, by copying it into an arena, which is the image of the file.

Small tensors, and those that anybody may change, are copied before ``save()`` returns; large ones that only an
optimizer changes, while training goes on, but before that optimizer steps. The shard is written behind the copy.
"""

from __future__ import annotations

import bisect
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.distributed.checkpoint.staging import AsyncStager

from dcpsvc import copying, devicecopy
from dcpsvc.copying import Copying
from dcpsvc.witness import Extent, Watch, flat, is_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from concurrent.futures import Executor

    from dcpsvc.arena import Arena, Reader
    from dcpsvc.copying import Batch, Task
    from dcpsvc.devicecopy import Devices, SideCopy
    from dcpsvc.format.shardfile import Placement
    from dcpsvc.outline import Large, Outline

_WRITE_NBYTES = 32 << 20
"""How far the writer may be behind the copy, at least."""

_BATCH = 4096
_BATCH_NBYTES = 256 << 20
"""At most so much is copied by one call, so that a Ctrl-C is heard."""


# Private in name, and what torch's own optimizers and FSDP2 are made of.
_copy = torch._foreach_copy_  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


class Staged(Protocol):
    """One rank's part of one step, ready to be written."""

    @property
    def nbytes(self) -> int:
        """Of the file up to its block table."""
        ...

    @property
    def lasting(self) -> bool:
        """Each of its parts is valid until the last has been written; else until the next one is asked for."""
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
        """The file up to its block table, in pieces of whole blocks."""
        ...


class Snapshot:
    """Copied into an arena.

    Args:
        outline: What; its tensors are let go of when they are copied.
        arena: Where to.
        threads: Where large tensors are copied.
        beside: What else must be read from the tensors before they change.
        on_copied: Called once, on any thread, when nothing is read from the state any more.
        watch: How closely, for changes, while training goes on.
        devices: From which is copied on a stream of its own; None: as torch does it, at once.
        waits: Whether the host waits for that, too, before ``save()`` returns.

    Attributes:
        nbytes: Of the file up to its block table.
        arena: Where to.
        copying: What is not copied when :meth:`stage` returns.
        reader: Who writes the file, once somebody does.
        hasher: Who hashes what was copied, while the save goes on.
    """

    lasting = True

    def __init__(
        self,
        outline: Outline,
        arena: Arena,
        threads: Executor,
        *,
        beside: Sequence[Task] = (),
        on_copied: Callable[[], None] = lambda: None,
        watch: Watch = Watch.CLOSELY,
        devices: Devices | None = None,
        waits: bool = False,
    ) -> None:
        self._outline, self.arena, self._host = outline, arena, arena.reserve(outline.nbytes)
        self._views = arena.cut(outline.placement)
        self.nbytes, self._threads, self._watch = outline.nbytes, threads, watch
        self._beside: list[SideCopy] = []
        self._left: list[int] = []
        if devices is not None and outline.large:
            self._beside, self._left = devicecopy.side_copies(outline, self._views, devices, watch, waits=waits)
        landings = [landing for each in self._beside for landing in each.landings]
        self.copying = Copying([*self._batches(), *landings, *beside], on_copied, self._beside)
        self.reader: Reader | None = None
        self.hasher: Reader | None = None

    @property
    def image(self) -> memoryview:
        """The bytes to write, valid until the arena is used again."""
        return self._host.numpy().data

    @property
    def given(self) -> dict[str, torch.Tensor]:
        """The image of the file."""
        return {"image": self._host}

    @property
    def ended(self) -> bool:
        """Nobody uses the arena any more."""
        return self.copying.ended and all(each.ended for each in (self.reader, self.hasher) if each is not None)

    def piece(self, name: str) -> torch.Tensor:
        """A piece in the arena."""
        return self._views[self._outline.placement.names.index(name)]

    def stage(self) -> None:
        """Copy every tensor that is not large straight to its place in the file, and begin with those that are."""
        outline = self._outline
        for each in self._beside:
            each.begin()  # first: it needs nobody from here on
        with torch.no_grad():
            for batch in self._at_once():
                # Small tensors cost a microsecond each so, and large ones are copied as fast as alone.
                _copy(self._views[batch], outline.sources[batch])
            for number in self._left_over():
                devicecopy.copy_by_rows(self._views[number], outline.sources[number])
        outline.forget()
        self._fill(0, outline.header)
        self._fill(*outline.placement.padding)
        self._fill(outline.placement.tensors_end, outline.objects)
        self.copying.start(self._threads)

    def forget(self) -> None:
        """Let go of the state, whatever is not copied yet."""
        self.hasher = None
        self.copying.call_off()
        self._outline.forget()

    def parts(self, resolve: Callable[[str], torch.Tensor]) -> Generator[memoryview]:
        """The image as it lies, each part as soon as it is copied.

        Raises:
            TornSnapshotError: A tensor was changed while it was copied.
        """
        del resolve  # every piece is at its place already
        for begin in range(0, self.nbytes, _WRITE_NBYTES):
            end = begin + _WRITE_NBYTES
            self.copying.wait_below(end)
            yield self.image[begin:end]
        self.copying.wait()

    def _left_over(self) -> list[int]:
        """Where devices copy beside, what is copied at once is not in one piece: it is copied one by one."""
        later = {large.number for large in self._outline.large}
        return [number for number in self._left if number not in later] if self._beside else []

    def _at_once(self) -> Iterator[slice]:
        if self._beside:
            return
        first = 0
        for large in self._outline.large:
            yield from _batches(self._outline.placement, first, large.number)
            first = large.number + 1
        yield from _batches(self._outline.placement, first, len(self._views))

    def _batches(self) -> Iterator[Batch]:
        outline = self._outline
        # What torch has to convert, gather or fetch on the way is copied by torch, and at once.
        outline.large = [
            each
            for each in outline.large
            if (source := outline.sources[each.number]).is_cpu and is_plain(source, self._views[each.number])
        ]
        return copying.batches(map(self._extent, outline.large), self._watch)

    def _extent(self, large: Large) -> tuple[int, int | None, Extent]:
        placement, index = self._outline.placement, large.number
        source, target = (flat(tensors[index]) for tensors in (self._outline.sources, self._views))
        return placement.begins[index], large.owner, Extent(placement.names[index], large.origin, source, target)

    def _fill(self, begin: int, data: bytes) -> None:
        self.image[begin : begin + len(data)] = data


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
        self._staged.forget()
        with self._lock:
            if not self._result.done():
                self._result.set_exception(error)

    def synchronize_staging(self) -> None:
        """Part of DCP's older protocol; see :attr:`should_synchronize_after_execute`."""

    def close(self) -> None:
        """The arena belongs to the Checkpointer."""


def _batches(placement: Placement, first: int, end: int) -> Iterator[slice]:
    """Pieces ``[first, end)``, some at a time."""
    begins = placement.begins
    while first < end:
        within = bisect.bisect_right(begins, begins[first] + _BATCH_NBYTES, hi=end)
        last = min(within, first + _BATCH)
        yield slice(first, last)
        first = last
