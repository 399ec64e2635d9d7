"""What DCP is told about a shard, through its planner: one item a piece, worked out once for a structure."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from dcpsvc.state.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.distributed.checkpoint.metadata import StorageMeta

    from dcpsvc.format.shardfile import Piece, Placement


class ShardPlan:
    """What DCP is told about a shard: the same for every save as long as its placement is."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def prepare(self) -> None:
        """Work all of it out now, and not when the first save needs it."""
        _ = self.local, self.metadata, self.results

    @functools.cached_property
    def local(self) -> SavePlan:
        """One item per piece, in the order of the file."""
        return SavePlan([_write_item(name, piece) for name, piece in self._pieces()])

    @functools.cached_property
    def metadata(self) -> Metadata:
        """As DCP describes a checkpoint of this one shard; the layout of all is ours."""
        return Metadata(state_dict_metadata={name: _tensor_metadata(piece) for name, piece in self._pieces()})

    @functools.cached_property
    def results(self) -> list[WriteResult]:
        """What was written when all is: for each item its size, and where in the file it begins."""
        begins = self._placement.begins
        return [
            WriteResult(item.index, item.tensor_storage_size() or 0, begin)
            for item, begin in zip(self.local.items, begins, strict=True)
        ]

    def _pieces(self) -> Iterator[tuple[str, Piece]]:
        return zip(self._placement.names, self._placement.pieces, strict=True)


class ShardPlanner(SavePlanner):
    """Plans what the placement says: the pieces of this rank, at their offsets.

    Args:
        plan: The same as at the last save, if nothing changed.
        piece: Gives a piece by its name in the file.
    """

    def __init__(self, plan: ShardPlan, piece: Callable[[str], torch.Tensor]) -> None:
        self._plan, self._piece = plan, piece

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to learn: what is staged is where the plan says."""

    def create_local_plan(self) -> SavePlan:
        """One item per piece."""
        return self._plan.local

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """This rank's plan is all there is here; the global layout is ours."""
        return all_plans, self._plan.metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Nothing to change."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The staged piece."""
        return self._piece(write_item.index.fqn)


def _write_item(name: str, piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size((0,) * len(piece.sizes)), torch.Size(piece.sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype_of(piece.dtype)), torch.Size(piece.sizes))
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _tensor_metadata(piece: Piece) -> TensorStorageMetadata:
    chunk = ChunkStorageMetadata(torch.Size((0,) * len(piece.sizes)), torch.Size(piece.sizes))
    return TensorStorageMetadata(TensorProperties(dtype=dtype_of(piece.dtype)), torch.Size(piece.sizes), [chunk])
