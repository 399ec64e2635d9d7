"""Which ranks hold the same part of a DTensor: on its own mesh, and on those beside it."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

    from dcpsvc.format.layout import Shape


@functools.lru_cache(maxsize=64)
def is_in(mesh: DeviceMesh, rank: int) -> bool:
    """Whether a rank is in a mesh.

    Where the mesh has not all ranks, others may hold the same tensor on one of theirs: what tensor parallelism leaves
    alone, FSDP2 shards in each of its columns. The mesh with the first rank writes.
    """
    return bool((mesh.mesh == rank).any())


@functools.lru_cache(maxsize=1024)
def alike(mesh: DeviceMesh, placements: tuple[Placement, ...], rank: int) -> Shape:
    """The ranks of a mesh that hold the same part as this one; none if it is not in it."""
    places = (mesh.mesh == rank).nonzero().tolist()
    if not places:
        return ()
    where = zip(places[0], placements, strict=True)
    along = tuple(slice(None) if placement.is_replicate() else place for place, placement in where)
    return tuple(sorted(mesh.mesh[along].flatten().tolist()))


@functools.lru_cache(maxsize=1024)
def alike_beside(mesh: DeviceMesh, placements: tuple[Placement, ...], rank: int) -> Shape:
    """Those, and their like on the meshes that were cut out of the same one beside this.

    A mesh that was made by itself has none beside it.
    """
    here = alike(mesh, placements, rank)
    root = mesh._get_root_mesh().mesh.contiguous()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - no public way
    places = torch.isin(root, mesh.mesh.flatten()).nonzero()
    own = [dim for dim in range(root.dim()) if len(places[:, dim].unique()) > 1]
    across = tuple(dim for dim in range(root.dim()) if dim not in own)
    if not here or not across or places.shape[0] != math.prod(root.shape[dim] for dim in own):
        return here
    same = torch.isin(root, torch.tensor(here)).any(dim=across, keepdim=True).expand_as(root)
    return tuple(sorted(root[same].tolist()))
