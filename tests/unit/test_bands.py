"""A box that cuts rows is filled band by band, whatever the order in which the pieces of the file arrive."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc import bands as bands_module
from dcpsvc.bands import bands
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.state.boxes import Place
from dcpsvc.storage.scatter import Needs, deliver
from tests.unit.on_a_device import OnADevice

if TYPE_CHECKING:
    import random

    import pytest

BEGIN = 12_340
"""Of the chunk in its file: no row begins where a block does."""


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int], list[int]]:
    sizes = tuple(draw(st.lists(st.integers(1, 40), max_size=3)))
    offsets = [draw(st.integers(0, size - 1)) for size in sizes]
    lengths = [draw(st.integers(1, size - offset)) for size, offset in zip(sizes, offsets, strict=True)]
    return sizes, offsets, lengths


def filled(
    chunk: torch.Tensor, offsets: list[int], lengths: list[int], target: torch.Tensor, order: random.Random
) -> torch.Tensor:
    """The box as it arrives when the file comes in pieces of any size and order."""
    image = bytes(BEGIN) + chunk.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    place = Place(0, BEGIN, tuple(chunk.shape), "F32")
    needs = Needs(bands(place, offsets, lengths, target), len(image))
    cuts = sorted({0, len(image), *(order.randrange(len(image)) for _ in range(5))})
    ranges = list(itertools.pairwise(cuts))
    order.shuffle(ranges)
    for begin, end in ranges:
        deliver(needs.parts(begin, end), begin, memoryview(image)[begin:end])
    return target


@given(boxes(), st.randoms(use_true_random=False), st.sampled_from([torch.float32, torch.float64]))
def test_any_box_arrives_whole(box: tuple[tuple[int, ...], list[int], list[int]], order, dtype) -> None:
    sizes, offsets, lengths = box
    chunk = torch.rand(sizes)
    wanted = chunk[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
    strided = torch.full((*lengths, 2), -1.0, dtype=dtype)[..., 0]
    assert torch.equal(filled(chunk, offsets, lengths, strided, order), wanted.to(dtype))
    away = OnADevice(torch.full((*lengths, 2), -1.0, dtype=dtype)[..., 0])
    filled(chunk, offsets, lengths, away, order)
    assert torch.equal(away.held, wanted.to(dtype))


def test_only_the_rows_of_the_box_are_asked_for_and_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands_module, "_BAND_NBYTES", 3 * 400)
    found = list(bands(Place(0, BEGIN, (50, 100), "F32"), [10, 5], [20, 7], torch.empty(20, 7)))
    assert [(band.begin, band.end) for band in found] == [
        (BEGIN + row * 400, BEGIN + min(row + 3, 30) * 400) for row in range(10, 30, 3)
    ]


def test_a_band_has_memory_only_while_it_is_being_filled() -> None:
    (band,) = bands(Place(0, 0, (BLOCK_NBYTES // 400, 100), "F32"), [0, 0], [100, 50], torch.empty(100, 50))
    band.view[:] = bytes(len(band.view))
    half = (band.end - band.begin) // 2
    band.filled(half)
    assert band._memory is not None
    band.filled(band.end - band.begin - half)
    assert band._memory is None


def test_a_box_on_a_device_gets_each_band_by_one_copy_and_a_file_read_in_order_has_one_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bands_module, "_BAND_NBYTES", 3 * 400)
    chunk, target = torch.rand(50, 100), OnADevice(torch.zeros(20, 7))
    image = bytes(BEGIN) + chunk.view(-1).view(torch.uint8).numpy().tobytes()
    found = list(bands(Place(0, BEGIN, (50, 100), "F32"), [10, 5], [20, 7], target))
    needs, most = Needs(found, len(image)), 0
    for begin in range(0, len(image), 90):
        end = min(begin + 90, len(image))
        deliver(needs.parts(begin, end), begin, memoryview(image)[begin:end])
        most = max(most, sum(band._memory is not None for band in found))
    assert torch.equal(target.held, chunk[10:30, 5:12])
    assert target.copies == [3 * 7 * 4] * 6 + [2 * 7 * 4]
    assert most == 1
