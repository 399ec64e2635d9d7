"""Who writes what: every element once, the bytes spread evenly, and every rank comes to the same answer alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpsvc.format import parts, shardfile
from dcpsvc.format.digest import digest
from dcpsvc.format.layout import ITEM_NBYTES
from dcpsvc.state import division
from dcpsvc.state.collected import Collected, Item, Sharing
from dcpsvc.state.division import MIN_SPLIT_NBYTES, Share
from dcpsvc.state.dtypes import dtype_of

if TYPE_CHECKING:
    from dcpsvc.format.layout import Layout

MIB = 1 << 20
dtypes = st.sampled_from(["F32", "BF16", "I8", "F64", "BOOL"])
shapes = st.one_of(
    st.lists(st.integers(0, 40), max_size=3).map(tuple),
    st.tuples(st.integers(1, 9000), st.integers(1, 3000)),
    st.tuples(st.integers(1, 3), st.integers(1, 4000), st.integers(1, 1000)),
    st.tuples(st.integers(1, 20_000_000)),
)
states = st.dictionaries(st.text("abcd", min_size=1, max_size=3), st.tuples(dtypes, shapes), max_size=6)


def collected(state: dict[str, tuple[str, tuple[int, ...]]], sharing: Sharing = Sharing.REPLICATED) -> Collected:
    """Tensors of any size without their memory: one element, seen many times."""
    found = Collected(0)
    for key, (dtype, shape) in state.items():
        tensor = torch.zeros((), dtype=dtype_of(dtype)).expand(shape)
        found.items[key] = Item(tensor, dtype, shape, (0,) * len(shape), sharing, writes=True, origin=tensor)
    return found


def divided(found: Collected, world_size: int) -> list[list[Share]]:
    return [division.shares(found, rank, world_size) for rank in range(world_size)]


def merged(shares: list[list[Share]]) -> Layout:
    """The layout of all parts; it refuses what does not cover every tensor."""
    placements = [shardfile.place(share.piece for share in mine) for mine in shares]
    said = [parts.part(placement, rank, {}) for rank, placement in enumerate(placements)]
    return parts.merge([part.own for part in said], {digest(part.common): part.common for part in said})


def nbytes(shares: list[Share]) -> int:
    return sum(share.piece.nbytes for share in shares)


@given(states, st.integers(1, 9))
@settings(max_examples=200)
def test_the_ranks_write_every_element_of_every_tensor_once(
    state: dict[str, tuple[str, tuple[int, ...]]], world_size: int
) -> None:
    layout = merged(divided(collected(state), world_size))
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in layout.tensors.items()} == state
    for tensor in layout.tensors.values():
        boxes = sorted((chunk.offsets, chunk.sizes) for chunk in tensor.chunks)
        for (low, sizes), (high, _) in itertools.pairwise(boxes):
            assert any(a + size == b for a, size, b in zip(low, sizes, high, strict=True)), "slabs lie end to end"


@given(states, st.integers(1, 9))
@settings(max_examples=200)
def test_no_rank_writes_much_more_than_its_part(state: dict[str, tuple[str, tuple[int, ...]]], world_size: int) -> None:
    total = sum(math.prod(shape) * ITEM_NBYTES[dtype] for dtype, shape in state.values())
    rows = [0]
    for dtype, shape in state.values():
        cut = next((extent for extent in shape if extent > 1), 1)
        rows.append(math.prod(shape) * ITEM_NBYTES[dtype] // cut)
    for shares in divided(collected(state), world_size):
        assert nbytes(shares) <= total / world_size + MIN_SPLIT_NBYTES + max(rows)


@given(states, st.integers(1, 9))
def test_every_rank_comes_to_the_same_answer_whatever_the_order_of_its_tensors(
    state: dict[str, tuple[str, tuple[int, ...]]], world_size: int
) -> None:
    turned = dict(reversed(state.items()))
    for one, other in zip(divided(collected(state), world_size), divided(collected(turned), world_size), strict=True):
        assert [share.piece for share in one] == [share.piece for share in other]


@st.composite
def meshes(draw: st.DrawFn) -> list[Collected]:
    """What each rank of a mesh of replicas and shards holds: parts cut along rows, consecutive elements, or all."""
    replicas, shards = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    state = draw(states)
    kinds = {key: draw(st.sampled_from(["rows", "elements", "all", "column 0"])) for key in state}
    found = [Collected(rank) for rank in range(replicas * shards)]
    for key, (dtype, shape) in state.items():
        for rank, into in enumerate(found):
            into.items[key] = held(kinds[key], dtype, shape, rank=rank, replicas=replicas, shards=shards)
    return found


def held(kind: str, dtype: str, shape: tuple[int, ...], *, rank: int, replicas: int, shards: int) -> Item:
    """A part as HSDP, FSDP1's HYBRID_SHARD or ``Replicate()`` has it; or a part of which another mesh has a copy."""
    replica, shard = divmod(rank, shards)
    alike = tuple(range(shard, replicas * shards, shards))
    offsets, sizes = (0,) * len(shape), shape
    match kind:
        case "rows" if shape:
            extent = -(-shape[0] // shards)
            first = min(shard * extent, shape[0])
            offsets, sizes = (first, *offsets[1:]), (min(extent, shape[0] - first), *shape[1:])
        case "elements" if shape:
            extent = -(-math.prod(shape) // shards)
            first = min(shard * extent, math.prod(shape))
            offsets, sizes = (first,), (min(extent, math.prod(shape) - first),)
            if len(shape) == 1 and sizes == (0,):
                offsets, sizes = shape, (0,)
        case _:
            alike = tuple(range(replicas * shards))
    writes = kind != "column 0" or replica == 0
    if kind == "column 0":  # each replica has one copy of its own
        alike = tuple(range(replica * shards, (replica + 1) * shards))
    tensor = torch.zeros((), dtype=dtype_of(dtype)).expand(sizes)
    alike = alike if len(alike) > 1 else ()
    return Item(tensor, dtype, shape, offsets, Sharing.SHARDED, writes, tensor, alike=alike)


def of_each(found: list[Collected]) -> list[list[Share]]:
    return [division.shares(each, rank, len(found)) for rank, each in enumerate(found)]


@given(meshes())
@settings(max_examples=300)
def test_what_some_ranks_hold_alike_they_write_once_together(found: list[Collected]) -> None:
    layout = merged(of_each(found))
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in layout.tensors.items()} == {
        key: (item.dtype, item.shape) for key, item in found[0].items.items()
    }


@given(meshes())
def test_a_share_of_a_part_is_a_view_of_those_of_its_elements_that_it_names(found: list[Collected]) -> None:
    for each, mine in zip(found, of_each(found), strict=True):
        for share in mine:
            assert tuple(share.source(each.items[share.piece.key].tensor).shape) == share.piece.sizes


def transformer(replicas: int, shards: int, kind: str) -> list[Collected]:
    """A model and its moments, of which each rank holds what such a mesh leaves it."""
    width, layers = 1024, 8
    shapes = {"embed": (32000, width), "head": (32000, width), "norm": (width,)}
    for layer in range(layers):
        shapes |= {f"{layer}.qkv": (3 * width, width), f"{layer}.out": (width, width), f"{layer}.norm": (width,)}
        shapes |= {f"{layer}.up": (4 * width, width), f"{layer}.down": (width, 4 * width), f"{layer}.b": (4 * width,)}
    found = [Collected(rank) for rank in range(replicas * shards)]
    for rank, into in enumerate(found):
        for key, shape in shapes.items():
            for what in ("model", "exp_avg", "exp_avg_sq"):
                into.items[f"{what}.{key}"] = held(kind, "F32", shape, rank=rank, replicas=replicas, shards=shards)
    return found


@pytest.mark.parametrize("kind", ["rows", "elements", "all"])
@pytest.mark.parametrize(("replicas", "shards"), [(2, 2), (8, 1), (4, 8), (16, 4)])
def test_replicas_of_a_sharded_transformer_write_as_much_each(kind: str, replicas: int, shards: int) -> None:
    written = [nbytes(mine) for mine in of_each(transformer(replicas, shards, kind))]
    assert max(written) / (sum(written) / len(written)) <= 1.05


def test_every_holder_of_a_part_comes_to_the_same_answer_whatever_the_order_of_its_tensors() -> None:
    found = transformer(4, 2, "rows")
    turned = [replace(each, items=dict(reversed(each.items.items()))) for each in found]
    assert [[share.piece for share in mine] for mine in of_each(found)] == [
        sorted((share.piece for share in mine), key=lambda piece: names.index(piece.name))
        for mine, names in zip(of_each(turned), [[s.piece.name for s in m] for m in of_each(found)], strict=True)
    ]


def test_what_the_ranks_of_one_replica_write_they_say_alike() -> None:
    found = transformer(4, 16, "rows")
    said = [
        parts.part(shardfile.place(share.piece for share in mine), rank, {}) for rank, mine in enumerate(of_each(found))
    ]
    assert len({part.common for part in said}) == 4
    assert max(len(part.own) for part in said) < 200
    layout = parts.merge([part.own for part in said], {digest(part.common): part.common for part in said})
    assert max(len(tensor.runs) for tensor in layout.tensors.values()) <= 3


@given(states, st.integers(1, 9))
def test_a_share_is_a_view_of_the_part_it_names(state: dict[str, tuple[str, tuple[int, ...]]], world_size: int) -> None:
    found = collected(state)
    for share in (share for mine in divided(found, world_size) for share in mine):
        assert tuple(share.source(found.items[share.piece.key].tensor).shape) == share.piece.sizes
        assert (
            share.source(found.items[share.piece.key].tensor).untyped_storage().nbytes()
            == ITEM_NBYTES[share.piece.dtype]
        )


def test_a_share_holds_the_values_of_its_rows() -> None:
    found = Collected(0)
    found.add("w", torch.arange(2 * MIB, dtype=torch.int32).view(1024, 2048), Sharing.REPLICATED)
    for share in (share for mine in divided(found, 3) for share in mine):
        first = share.piece.offsets[0]
        assert torch.equal(
            share.source(found.items[share.piece.key].tensor),
            found.items["w"].tensor[first : first + share.piece.sizes[0]],
        )


def test_one_big_tensor_is_cut_into_equal_parts() -> None:
    shares = divided(collected({"w": ("F32", (1024, 1024))}), 4)
    assert [[share.piece.name for share in mine] for mine in shares] == [
        ["w[0:256,0:1024]"], ["w[256:512,0:1024]"], ["w[512:768,0:1024]"], ["w[768:1024,0:1024]"],
    ]  # fmt: skip


def test_small_tensors_are_never_cut() -> None:
    state = {f"w{i}": ("F32", (MIN_SPLIT_NBYTES // 4 - 1,)) for i in range(7)}
    assert all(share.piece.sizes == share.piece.shape for mine in divided(collected(state), 3) for share in mine)


def test_a_tensor_with_leading_ones_is_cut_along_its_first_real_dimension() -> None:
    (first, *_), *_ = divided(collected({"w": ("F32", (1, 1, 1024, 1024))}), 2)
    assert first.piece.sizes == (1, 1, 512, 1024)


@pytest.mark.parametrize("shape", [(), (0,), (4, 0)])
def test_a_tensor_without_bytes_or_dimensions_is_written_once(shape: tuple[int, ...]) -> None:
    for state in ({"w": ("F32", shape)}, {"a": ("F32", (10,)), "w": ("F32", shape), "z": ("F32", (10,))}):
        names = [share.piece.key for mine in divided(collected(state), 4) for share in mine]
        assert sorted(names) == sorted(state)


def test_buffers_are_written_by_rank_0_alone() -> None:
    shares = divided(collected({"running_mean": ("F32", (8,)), "w": ("F32", (4096, 4096))}, Sharing.FIRST), 3)
    assert [len(mine) for mine in shares] == [2, 0, 0]


def test_a_rank_of_its_own_value_writes_it_whole() -> None:
    shares = divided(collected({"rng@0.torch": ("U8", (2 * MIB,))}, Sharing.PER_RANK), 1)
    assert [share.piece.name for share in shares[0]] == ["rng@0.torch"]


def test_a_sharded_part_is_written_by_the_rank_that_writes_it() -> None:
    found = Collected(0)
    for key, writes in (("mine", True), ("other", False)):
        found.items[key] = Item(
            torch.zeros(2, 4), "F32", (8, 4), (2, 0), Sharing.SHARDED, writes=writes, origin=torch.zeros(2, 4)
        )
    assert [share.piece.name for share in division.shares(found, 5, 9)] == ["mine[2:4,0:4]"]
