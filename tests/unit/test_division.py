"""Who writes what: every element once, the bytes spread evenly, and every rank comes to the same answer alone."""

from __future__ import annotations

import itertools
import math
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


@given(states, st.integers(1, 9))
def test_a_share_is_a_view_of_the_part_it_names(state: dict[str, tuple[str, tuple[int, ...]]], world_size: int) -> None:
    found = collected(state)
    for share in (share for mine in divided(found, world_size) for share in mine):
        assert tuple(share.source(found).shape) == share.piece.sizes
        assert share.source(found).untyped_storage().nbytes() == ITEM_NBYTES[share.piece.dtype]


def test_a_share_holds_the_values_of_its_rows() -> None:
    found = Collected(0)
    found.add("w", torch.arange(2 * MIB, dtype=torch.int32).view(1024, 2048), Sharing.REPLICATED)
    for share in (share for mine in divided(found, 3) for share in mine):
        first = share.piece.offsets[0]
        assert torch.equal(share.source(found), found.items["w"].tensor[first : first + share.piece.sizes[0]])


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
