"""Which part of a tensor this rank holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.tensor import DTensor

from dcpsvc.state.ragged import Ragged

if TYPE_CHECKING:
    from collections.abc import Hashable

    import torch

    from dcpsvc.format.layout import Shape

_chunks: dict[Hashable, tuple[Shape, Shape]] = {}
"""A pure function of the keys: torch takes 50 us for it, and there are hundreds of tensors in each save."""


def local_chunk(tensor: torch.Tensor) -> tuple[Shape, Shape]:
    """Offsets and sizes of what this rank holds of a tensor; of a ragged one, of the box around it."""
    if isinstance(tensor, Ragged):
        return tensor.bounding()
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    key = (tensor.device_mesh, tensor.placements, tensor.shape)
    if key not in _chunks:
        chunks = tensor.__create_chunk_list__()
        whole = ((0,) * tensor.dim(), tuple(tensor.shape))
        _chunks[key] = (tuple(chunks[0].offsets), tuple(chunks[0].sizes)) if chunks else whole
    return _chunks[key]
