"""The layout: what parses covers every tensor, and damage is told as a LayoutError."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc.errors import LayoutError
from dcpsvc.format import layout
from dcpsvc.format.digest import digest
from dcpsvc.format.layout import ITEM_NBYTES, Chunk, Layout, Tensor
from dcpsvc.format.tiling import uncovered

PATH = "layouts/x.json"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def tensor(shape: tuple[int, ...], *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    return Tensor.of("F32", shape, (Chunk(rank, *box, 4096) for rank, box in enumerate(boxes)))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A tensor cut into slabs along one dimension, in any order."""
    shape = draw(st.lists(st.integers(0, 6), max_size=3).map(tuple))
    if not shape:
        return Tensor.of(
            draw(st.sampled_from(sorted(ITEM_NBYTES))), (), [Chunk(0, (), (), draw(st.integers(0, 1 << 40)))]
        )
    dim = draw(st.integers(0, len(shape) - 1))
    cuts = sorted(
        draw(
            st.sets(st.integers(1, max(shape[dim] - 1, 1)).filter(lambda cut: cut < shape[dim]), max_size=3)
            if shape[dim] > 1
            else st.just(set())
        )
    )
    chunks = [
        Chunk(
            rank=draw(st.integers(0, 9)),
            offsets=tuple(low if d == dim else 0 for d in range(len(shape))),
            sizes=tuple(high - low if d == dim else extent for d, extent in enumerate(shape)),
            begin=draw(st.integers(0, 1 << 40)),
        )
        for low, high in zip([0, *cuts], [*cuts, shape[dim]], strict=True)
    ]
    return Tensor.of(draw(st.sampled_from(sorted(ITEM_NBYTES))), shape, draw(st.permutations(chunks)))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    found = draw(st.dictionaries(st.text(max_size=6), tensors(), max_size=4))
    targets = st.sampled_from(sorted(found)) if found else st.nothing()
    return Layout(found, draw(st.dictionaries(st.text(max_size=6), targets, max_size=2)))


def loads(data: bytes) -> Layout:
    return layout.loads(PATH, data, digest(data))


def refused(content: Any) -> str:
    data = json.dumps(content).encode()
    with pytest.raises(LayoutError) as caught:
        loads(data)
    assert caught.value.path == PATH
    return caught.value.reason


def content(shape: Any, chunks: Any, *, dtype: Any = "F32") -> dict[str, Any]:
    return {"format": 1, "aliases": {}, "tensors": {"w": [dtype, shape, chunks]}}


@given(layouts())
def test_a_layout_reads_back_as_it_was_written(written: Layout) -> None:
    assert loads(written.dumps()) == written


@given(layouts())
def test_equal_layouts_have_equal_bytes_whatever_the_order_of_their_names(written: Layout) -> None:
    turned = Layout(dict(reversed(written.tensors.items())), dict(reversed(written.aliases.items())))
    assert turned.dumps() == written.dumps()


def test_an_alias_finds_the_tensor_it_stands_for() -> None:
    found = Layout({"emb": tensor((2,), ((0,), (2,)))}, {"head": "emb"})
    assert found.find("head") is found.find("emb") is found.tensors["emb"]
    assert found.find("other") is None
    assert found.names() == ["emb", "head"]


@given(st.data())
def test_a_changed_byte_is_told_by_the_checksum(data: st.DataObject) -> None:
    written = Layout({"w": tensor((4, 4), ((0, 0), (4, 4)))}).dumps()
    damaged = bytearray(written)
    damaged[data.draw(st.integers(0, len(written) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(LayoutError, match=f"^{PATH}: checksum is .*, the manifest says {digest(written)}"):
        layout.loads(PATH, bytes(damaged), digest(written))


@pytest.mark.parametrize(
    "boxes",
    [
        [],
        [((0, 0), (3, 4))],
        [((0, 0), (2, 4)), ((3, 0), (1, 4))],
        [((0, 0), (4, 4)), ((0, 0), (1, 1))],
        [((0, 0), (2, 4)), ((0, 0), (2, 4))],
        [((1, 0), (4, 4))],
        [((0, 0), (2, 4)), ((3, 0), (2, 4))],
        [((0, 0), (8, 2))],
        [((0, 0), (1, 16))],
    ],
    ids=str,
)
def test_chunks_that_are_no_exact_cover_are_refused_with_the_tensor_named(boxes: list[Any]) -> None:
    chunks = [[rank, *box, 4096] for rank, box in enumerate(boxes)]
    assert uncovered(tensor((4, 4), *boxes)) is not None
    assert refused(content([4, 4], chunks)).startswith("w: ")


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (4, 4)])
def test_one_chunk_covers_its_whole_tensor(shape: tuple[int, ...]) -> None:
    assert uncovered(tensor(shape, ((0,) * len(shape), shape))) is None


def test_an_empty_chunk_beside_a_full_one_does_no_harm() -> None:
    assert uncovered(tensor((2,), ((0,), (2,)), ((0,), (0,)))) is None


@pytest.mark.parametrize("aliases", [{"head": "nothing"}, {"a": "b", "b": "w"}, {"head": 7}, {"head": None}])
def test_an_alias_that_stands_for_no_tensor_is_refused(aliases: dict[str, Any]) -> None:
    assert "stands for no tensor" in refused(content([1], [[0, [0], [1], 0]]) | {"aliases": aliases})


@pytest.mark.parametrize(
    "bad",
    [
        {"format": 2}, {"format": True}, {"format": "1"}, {"aliases": []}, {"aliases": None}, {"tensors": []},
        {"tensors": {"w": None}}, {"tensors": {"w": []}}, {"tensors": {"w": "abc"}}, {"tensors": {"w": {"a": 1}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_of_another_kind_is_refused(bad: dict[str, Any]) -> None:
    refused(content([1], [[0, [0], [1], 0]]) | bad)


@pytest.mark.parametrize(
    ("shape", "chunks", "dtype"),
    [
        ([1], [[0, [0], [1], 0]], "F31"), ([1], [[0, [0], [1], 0]], None), ([1], [[0, [0], [1], 0]], ["F32"]),
        ([True], [[0, [0], [1], 0]], "F32"), ([-1], [[0, [0], [-1], 0]], "F32"), ([1.0], [[0, [0], [1], 0]], "F32"),
        ("x", [[0, [0], [1], 0]], "F32"), ([1] * 65, [[0, [0] * 65, [1] * 65, 0]], "F32"),
        ([1], [[-1, [0], [1], 0]], "F32"), ([1], [[True, [0], [1], 0]], "F32"), ([1], [[1 << 60, [0], [1], 0]], "F32"),
        ([1], [[0, [0], [1], -1]], "F32"), ([1], [[0, [0], [1], 1 << 60]], "F32"), ([1], [[0, [0, 0], [1], 0]], "F32"),
        ([1], [[0, [0], [1]]], "F32"), ([1], [7], "F32"), ([1], 7, "F32"), ([1], None, "F32"),
        ([1], [[0, [-1], [1], 0]], "F32"), ([1], [{"rank": 0}], "F32"),
    ],
)  # fmt: skip
def test_a_tensor_that_makes_no_sense_is_refused(shape: Any, chunks: Any, dtype: Any) -> None:
    refused(content(shape, chunks, dtype=dtype))


@given(st.binary())
def test_arbitrary_bytes_are_only_ever_a_layout_error(data: bytes) -> None:
    with pytest.raises(LayoutError):
        loads(data)


@given(
    value=json_values,
    place=st.sampled_from(["root", "format", "aliases", "tensors", "tensor", "shape", "chunk", "offsets"]),
)
def test_damaged_json_gives_a_layout_or_a_layout_error(value: Any, place: str) -> None:
    chunk = [0, value if place == "offsets" else [0], [1], 0]
    whole: Any = content(value if place == "shape" else [1], [value if place == "chunk" else chunk])
    if place == "tensor":
        whole["tensors"]["w"] = value
    elif place == "root":
        whole = value
    elif place in whole:
        whole[place] = value
    try:
        found = loads(json.dumps(whole).encode())
    except LayoutError:
        return
    assert all(uncovered(tensor) is None for tensor in found.tensors.values())
