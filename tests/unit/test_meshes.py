"""R29: which ranks hold the same part of a DTensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcpsvc.state import meshes

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=[0, 5, 7])
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """One of 8, of which this process is the only one."""
    found: int = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=found, world_size=8)
    yield found
    dist.destroy_process_group()


def cube() -> Any:
    return init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicas", "shards", "tp"))


def test_what_tensor_parallelism_leaves_alone_is_the_same_in_each_column(rank: int) -> None:
    column = cube()["shards"]
    assert meshes.alike(column, (Shard(0),), rank) == (rank,)
    shard = rank // 2 % 2
    assert meshes.alike_beside(column, (Shard(0),), rank) == tuple(r for r in range(8) if r // 2 % 2 == shard)
    assert meshes.alike_beside(column, (Replicate(),), rank) == tuple(range(8))


def test_replicas_inside_a_mesh_and_beside_it_are_compared_together(rank: int) -> None:
    column = cube()["replicas", "shards"]
    shard = rank // 2 % 2
    assert len(meshes.alike(column, (Replicate(), Shard(0)), rank)) == 2
    expected = tuple(r for r in range(8) if r // 2 % 2 == shard)
    assert meshes.alike_beside(column, (Replicate(), Shard(0)), rank) == expected
    assert meshes.alike_beside(column, (Shard(0), Shard(0)), rank) == (rank // 2 * 2, rank // 2 * 2 + 1)


def test_dimensions_that_were_made_one_count_as_those_they_were(rank: int) -> None:
    flat = cube()["replicas", "shards"]._flatten("data")
    assert meshes.alike_beside(flat, (Shard(0),), rank) == (rank // 2 * 2, rank // 2 * 2 + 1)


def test_a_mesh_of_all_ranks_or_made_by_itself_has_none_beside_it(rank: int) -> None:
    assert meshes.alike_beside(cube(), (Shard(0), Shard(0), Shard(0)), rank) == (rank,)
    alone = DeviceMesh("cpu", [rank, (rank + 1) % 8])
    assert meshes.alike_beside(alone, (Shard(0),), rank) == (rank,)
