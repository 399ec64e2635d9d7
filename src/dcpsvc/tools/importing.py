"""A committed checkpoint out of what another library wrote: tensor by tensor, without torch, a GPU or training code.

By the protocol of a job of one process, as in :mod:`~dcpsvc.tools.surgery`. One that was cut short goes on under its
attempt: shards that are whole at the run root are not sent again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from dcpsvc import fence
from dcpsvc.errors import DestinationError, LayoutError, StoreNotFoundError
from dcpsvc.format import epochs, keys, shardfile
from dcpsvc.format.digest import digest
from dcpsvc.format.layout import Chunk, Layout, Tensor
from dcpsvc.format.manifest import Manifest
from dcpsvc.format.parse import compact
from dcpsvc.format.shardfile import Piece
from dcpsvc.format.tiling import uncovered
from dcpsvc.stages import discover, upload
from dcpsvc.tools import owning, surgery
from dcpsvc.tools.casting import cast, result
from dcpsvc.tools.newshard import new_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dcpsvc.format.keys import Attempt, Epoch
    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.storage.base import Store
    from dcpsvc.tools.foreign import Foreign, Found
    from dcpsvc.tools.foreignoptimizer import Optimizer

MAX_SHARD_NBYTES = 4 << 30
"""A shard goes through a temporary file of its size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """What to make of it.

    Attributes:
        found: What there is.
        target: The run root; a run is made if there is none.
        step: Of the checkpoint.
        component: What the module is called in the state.
        dtype: Floating-point tensors are cast to that; None: they stay.
        max_shard_nbytes: A shard is larger only for a tensor that is.
        optimizer: Taken with it; its tensors are not cast.
    """

    found: Found
    target: Store
    step: int = 0
    component: str = "model"
    dtype: str | None = None
    max_shard_nbytes: int = MAX_SHARD_NBYTES
    optimizer: Optimizer | None = None

    @property
    def nbytes(self) -> int:
        """To be read."""
        return sum(tensor.nbytes for tensor in self._tensors)

    @property
    def _tensors(self) -> list[Foreign]:
        """By their keys in the checkpoint."""
        mine = [replace(tensor, name=f"{self.component}.{tensor.name}") for tensor in self.found.tensors]
        return [*mine, *(self.optimizer.tensors if self.optimizer else ())]

    def commit(self, progress: Callable[[int], None], *, take_over: bool = False) -> Manifest:
        """Write the shards and commit. ``resume()`` and ``load()`` take the result.

        Args:
            progress: Called with the number of bytes just read.
            take_over: Also if the last job of the run ran on another host.

        Raises:
            DestinationError: The run has a commit of that step or a later one.
            ForeignFormatError: A file does not hold what it says.
            RunBusyError: A job of the run lives, or may live.
            StoreError: The run root does not answer, or does not take it.
        """
        run_id = surgery.identity_of(self.target)
        if newer := [attempt.step for attempt in discover.committed(self.target) if attempt.step >= self.step]:
            raise DestinationError(self.target.url, f"has step {newer[-1]} already; give a STEP beyond it")
        owning.check_idle(self.target, run_id, take_over=take_over)
        attempt = self._epoch().attempt(self.step, 0)
        records, made = self._write(attempt, progress)
        manifest = Manifest(
            run_id=run_id,
            step=self.step,
            attempt=attempt.attempt,
            created=owning.utc_now(),
            shards=tuple(records),
            layout=upload.put_layout(self.target, made.dumps()),
            versions={"dcpsvc": metadata.version("dcpsvc"), "imported": f"{self.found.kind} {self.found.path}"},
        )
        surgery.publish(self.target, manifest)
        return manifest

    def _epoch(self) -> Epoch:
        """That of the same import, if it was cut short and nobody has claimed the root since; else a new one."""
        about = [self.found.kind, self.found.state, self.step, self.component, self.dtype, self.max_shard_nbytes]
        names = [[tensor.name, tensor.offsets] for tensor in self._tensors]
        token = digest(compact([about, names, dict(self.found.aliases)]))[:8]
        claims = [found for entry in self.target.list(keys.EPOCHS) if (found := keys.epoch_of(entry.key))]
        newest = max((epoch for epoch, is_inheritance in claims if not is_inheritance), default=None)
        if newest is None or newest.token != token:
            return owning.claim(self.target, token=token)
        try:
            self.target.get(newest.inheritance, max_nbytes=epochs.MAX_NBYTES)
        except StoreNotFoundError:
            fence.inherit(self.target, newest, discover.committed(self.target))
        return newest

    def _write(self, attempt: Attempt, progress: Callable[[int], None]) -> tuple[list[ShardRecord], Layout]:
        records: list[ShardRecord] = []
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        chunks: dict[str, list[Chunk]] = {}
        for rank, tensors in enumerate(divided(self._tensors, self.max_shard_nbytes)):
            given = {self._piece(tensor): tensor for tensor in tensors}
            placement = shardfile.place(given)
            for piece, begin in zip(placement.pieces, placement.begins, strict=True):
                shapes[piece.key] = (piece.dtype, piece.shape)
                chunks.setdefault(piece.key, []).append(Chunk(rank, piece.offsets, piece.sizes, begin))
            documents = compact(self._documents() if rank == 0 else {})
            data = functools.partial(self._read, given, progress)
            with new_shard(placement, documents, attempt, rank, data) as (record, path):
                upload.ensure_shard(self.target, record, path)
            records.append(record)
        return records, self._layout({key: Tensor.of(*shapes[key], chunks[key]) for key in shapes})

    def _layout(self, tensors: dict[str, Tensor]) -> Layout:
        for key, tensor in tensors.items():
            if reason := uncovered(tensor):
                raise LayoutError(str(self.found.path), f"{key}: {reason}")
        aliases = {f"{self.component}.{name}": f"{self.component}.{of}" for name, of in self.found.aliases.items()}
        return Layout(tensors, aliases)

    def _documents(self) -> dict[str, Any]:
        optimizer = {self.optimizer.name: dict(self.optimizer.document)} if self.optimizer else {}
        return {self.component: dict(self.found.about)} | optimizer

    def _stored(self, tensor: Foreign) -> str:
        return result(tensor.dtype, self.dtype) if tensor.name.startswith(f"{self.component}.") else tensor.dtype

    def _piece(self, tensor: Foreign) -> Piece:
        dtype = self._stored(tensor)
        return Piece(tensor.name, dtype, tensor.shape, tensor.offsets, tensor.sizes)

    def _read(
        self, given: dict[Piece, Foreign], progress: Callable[[int], None], piece: Piece
    ) -> Iterator[bytes | memoryview]:
        tensor = given[piece]
        wanted = self._stored(tensor)
        for data in tensor.read():
            progress(len(data))
            if wanted == tensor.dtype:
                yield data
            else:
                import numpy as np  # which all other commands do without

                yield cast(np.frombuffer(data, dtype=np.uint8), tensor.dtype, wanted).data


def divided(tensors: Sequence[Foreign], max_nbytes: int) -> list[list[Foreign]]:
    """The tensors of each shard, in order; at least one shard."""
    parts: list[list[Foreign]] = [[]]
    room = max_nbytes
    for tensor in tensors:
        if tensor.nbytes > room and parts[-1]:
            parts.append([])
            room = max_nbytes
        parts[-1].append(tensor)
        room -= tensor.nbytes
    return parts
