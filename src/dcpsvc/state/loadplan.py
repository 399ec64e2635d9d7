"""What DCP plans when we load: exactly the boxes asked for, whoever wrote which part of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dcpsvc.errors import StateMismatchError
from dcpsvc.state.dtypes import dtype_of

if TYPE_CHECKING:
    import io
    from collections.abc import Iterable, Sequence

    from dcpsvc.format.layout import Chunk, Layout
    from dcpsvc.format.layout import Tensor as Described
    from dcpsvc.state.saved import Want


class WantPlanner(LoadPlanner):
    """Plans exactly the boxes asked for, with DCP's resharding.

    Args:
        layout: Of the checkpoint.
        wants: The boxes.
    """

    def __init__(self, layout: Layout, wants: Sequence[Want]) -> None:
        self._layout = layout
        self._wants = {want.key: want for want in wants}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """The boxes are known already."""

    def create_local_plan(self) -> LoadPlan:
        """Intersect each box with the saved chunks."""
        return LoadPlan([item for want in self._wants.values() for item in self._items(want)])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Each rank reads for itself."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Nothing to change."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never planned: documents are read by themselves."""
        raise StateMismatchError(read_item.dest_index.fqn, "planned as a tensor, stored as a value")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of the box that an item fills."""
        target = self._wants[read_item.dest_index.fqn].out
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do."""

    def _items(self, want: Want) -> list[ReadItem]:
        described = self._layout.find(want.key)
        if described is None or want.out.numel() == 0:
            return []
        box = ChunkStorageMetadata(torch.Size(want.offsets), want.out.shape)
        few = described.overlapping(want.offsets, want.out.shape)  # of thousands, where as many ranks have saved
        return create_read_items_for_chunk_list(want.key, tensor_metadata(described, few), [box])


def tensor_metadata(tensor: Described, chunks: Iterable[Chunk]) -> TensorStorageMetadata:
    """A tensor of a layout in DCP's terms, with some of its chunks; empty ones left out."""
    found = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in chunks if c.numel]
    return TensorStorageMetadata(TensorProperties(dtype=dtype_of(tensor.dtype)), torch.Size(tensor.shape), found)
