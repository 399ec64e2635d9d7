"""Stage: copy this rank's part into the arena, which is the image of the file it will become."""

from __future__ import annotations

import mmap
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.staging import AsyncStager

from dcpsvc.format import shardfile
from dcpsvc.format.parse import compact
from dcpsvc.state.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dcpsvc.format.shardfile import Placement
    from dcpsvc.state.division import Share


_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
"""A forked data loader worker must not write into its parent's arena."""


class Arena:
    """A host buffer that holds one shard at a time and is used again for the next. One owner at a time."""

    def __init__(self) -> None:
        self._buffer: mmap.mmap | None = None
        self._tensor = torch.empty(0, dtype=torch.uint8)

    def reserve(self, nbytes: int) -> torch.Tensor:
        """At least ``nbytes`` of page-aligned bytes as a uint8 tensor; what was in it is void."""
        if self._tensor.numel() < nbytes:
            self._tensor = torch.empty(0, dtype=torch.uint8)
            self._buffer = mmap.mmap(-1, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE, flags=_PRIVATE)
            self._tensor = torch.frombuffer(self._buffer, dtype=torch.uint8)
        return self._tensor[:nbytes]


class Snapshot:
    """One rank's part of one step, being staged.

    Attributes:
        placement: Where each piece lies.
        tensors: The pieces in the arena, by their name in the file.
        image: Header, tensors and objects: the file up to its block table.
    """

    def __init__(
        self,
        arena: Arena,
        shares: Sequence[Share],
        documents: Mapping[str, Any],
        metadata: Mapping[str, str],
    ) -> None:
        self.placement: Placement = shardfile.place(share.piece for share in shares)
        self._sources = {share.piece.name: share.source for share in shares}
        self._objects = compact(documents)
        self._header = shardfile.header(self.placement, len(self._objects), metadata)
        self._host = arena.reserve(self.placement.tensors_end + len(self._objects))
        self.tensors = self._views()

    @property
    def image(self) -> memoryview:
        """The bytes to write, valid until the arena is used again."""
        return self._host.numpy().data

    def copy(self) -> None:
        """Copy every tensor straight to its place in the file. The state may change once this returns."""
        for name, view in self.tensors.items():
            view.copy_(self._sources[name])
        self._sources.clear()
        self._fill(0, self._header)
        self._fill(self.placement.tensors_end, self._objects)

    def _views(self) -> dict[str, torch.Tensor]:
        views: dict[str, torch.Tensor] = {}
        for piece, begin in zip(self.placement.pieces, self.placement.begins, strict=True):
            flat = self._host[begin : begin + piece.nbytes].view(dtype_of(piece.dtype))
            views[piece.name] = flat.view(piece.sizes)
        return views

    def _fill(self, begin: int, data: bytes) -> None:
        self.image[begin : begin + len(data)] = data


class ArenaStager(AsyncStager):
    """DCP's staging seam: copies into the arena at once, and lets DCP go on only when the gate opens.

    The gate is the meeting of all ranks. DCP plans and writes once the future resolves, so a rank that is
    missing, failed or disagrees costs a clean error here and never a half-written shard.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.gate: Future[dict[str, Any]] = Future()

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Nothing is left to wait for: the copy is done when ``stage`` returns."""
        return False

    def stage(self, state_dict: dict[str, Any]) -> Future[dict[str, Any]]:
        """Called by ``async_save`` on the training thread."""
        del state_dict  # the snapshot knows which part of it this rank writes
        self._snapshot.copy()
        return self.gate

    def open(self) -> None:
        """Every rank has arrived and agrees: let DCP write."""
        if self.gate.set_running_or_notify_cancel():
            self.gate.set_result(dict(self._snapshot.tensors))

    def refuse(self, error: BaseException) -> None:
        """The save has ended before a byte was written."""
        if not self.gate.done() and self.gate.set_running_or_notify_cancel():
            self.gate.set_exception(error)

    def synchronize_staging(self) -> None:
        """Part of DCP's older protocol; the copy is done already."""

    def close(self) -> None:
        """The arena belongs to the Checkpointer."""
