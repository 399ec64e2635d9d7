"""Consecutive elements of a flat tensor are written as boxes and read as the box around them."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc.format.layout import Chunk, Tensor
from dcpsvc.format.tiling import uncovered
from dcpsvc.state.ragged import Holders, Ragged, bounding, boxes


@st.composite
def cuts(draw):
    """A shape, and where its flat elements are cut."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    numel = math.prod(shape)
    inner = draw(st.lists(st.integers(0, numel), max_size=3))
    return shape, sorted({0, numel, *inner})


def box_of(whole, offsets, sizes):
    return whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]


@given(cuts())
def test_the_boxes_of_all_pieces_tile_the_tensor_and_hold_its_elements_in_order(cut):
    shape, ends = cut
    whole = torch.arange(math.prod(shape)).view(shape)
    chunks = []
    for begin, end in itertools.pairwise(ends):
        found = list(boxes(shape, begin, end - begin))
        assert len(found) <= 2 * len(shape) - 1
        elements = [box_of(whole, offsets, sizes).reshape(-1) for _, offsets, sizes in found]
        assert torch.cat(elements).tolist() == list(range(begin, end))
        assert [before for before, _, _ in found] == [int(part[0]) - begin for part in elements]
        chunks += [Chunk(0, offsets, sizes, 0) for _, offsets, sizes in found]
    assert uncovered(Tensor.of("I64", shape, chunks)) is None


@given(cuts())
def test_the_box_around_a_piece_gives_its_elements_and_at_most_two_rows_more(cut):
    shape, ends = cut
    whole = torch.arange(math.prod(shape)).view(shape)
    for begin, end in itertools.pairwise(ends):
        offsets, sizes = bounding(shape, begin, end - begin)
        ragged = Ragged(whole.view(-1)[begin:end], shape, begin, whole, Holders((0,)))
        assert ragged.picked(box_of(whole, offsets, sizes).contiguous()).tolist() == list(range(begin, end))
        row = next((math.prod(shape[d + 1 :]) for d in range(len(shape)) if sizes[d] > 1), 1)
        assert math.prod(sizes) < end - begin + 2 * row


def test_a_rank_with_no_element_asks_for_nothing():
    assert bounding((3, 4), 0, 0) == ((0, 0), (0, 0))
    assert list(boxes((3, 4), 0, 0)) == []


def test_nothing_can_be_computed_with_a_piece_as_if_it_were_the_whole():
    whole = torch.zeros(3, 4)
    with pytest.raises(NotImplementedError, match="on other ranks"):
        Ragged(whole.view(-1)[:5], (3, 4), 0, whole, Holders((0,))) + 1


def test_of_groups_that_hold_the_same_tensor_one_counts():
    assert Holders((1, 4, 6), (0, 1, 4, 6)).count(0)
    assert not Holders((1, 4, 6), (0, 1, 4, 6)).count(7)  # another group's copy counts
    assert Holders((1, 4, 6)).count(7)  # there is no other group
