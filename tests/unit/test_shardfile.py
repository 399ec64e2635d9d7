"""A shard is a safetensors file: any tool opens it, and every piece lies where the layout says."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from dcpsvc.errors import CorruptShardError
from dcpsvc.format import digest, shardfile
from dcpsvc.format.layout import ITEM_NBYTES
from dcpsvc.format.shardfile import BLOCKS, FOREIGN, OBJECTS, PADDING, PAGE_NBYTES, Piece, Placement
from dcpsvc.state.dtypes import dtype_of

if TYPE_CHECKING:
    from pathlib import Path

PATH = "data/step-000000000007.cafe-0/rank-00000.safetensors"
METADATA = {"step": "7", "attempt": "cafe-0", "rank": "0"}
DOCUMENTS = {"sched": {"last_epoch": 7}}


def whole(key: str, dtype: str, *shape: int) -> Piece:
    return Piece(key, dtype, shape, (0,) * len(shape), shape)


@st.composite
def pieces(draw: st.DrawFn) -> list[Piece]:
    names = st.text("abcdefghij._0123456789", min_size=1, max_size=20)
    found = []
    for name in draw(st.sets(names, max_size=8)):
        shape = draw(st.lists(st.integers(0, 5), max_size=3).map(tuple))
        sizes = tuple(draw(st.integers(0, extent)) for extent in shape)
        offsets = tuple(draw(st.integers(0, extent - size)) for extent, size in zip(shape, sizes, strict=True))
        found.append(Piece(f"s.{name}", draw(st.sampled_from(sorted(ITEM_NBYTES))), shape, offsets, sizes))
    return found


def filled(placement: Placement, documents: Any = DOCUMENTS, metadata: dict[str, str] | None = None) -> bytes:
    """A shard with every tensor byte set to a function of its place, as the stages would write it."""
    objects = json.dumps(documents).encode()
    head = shardfile.header(placement, len(objects), metadata or METADATA)
    data = bytes(i * 7 % 2 for i in range(placement.tensors_end - placement.data_begin))  # every dtype reads 0 and 1
    body = head + data + objects
    return body + digest.table(memoryview(body))


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def check_opens(path: Path, placement: Placement) -> None:
    """The real safetensors library finds every piece under its name, with our bytes."""
    content = filled(placement)
    path.write_bytes(content)
    with safe_open(path, framework="pt") as file:
        ours = {OBJECTS, BLOCKS, PADDING} if placement.padding[1] else {OBJECTS, BLOCKS}
        assert set(file.keys()) == {piece.name for piece in placement.pieces} | ours
        assert file.metadata() == {"format": "pt", "dcpsvc": "1", **METADATA}
        for piece, begin in zip(placement.pieces, placement.begins, strict=True):
            tensor = file.get_tensor(piece.name)
            dtype, parts = FOREIGN.get(piece.dtype, (piece.dtype, ()))
            assert (tuple(tensor.shape), tensor.dtype) == ((*piece.sizes, *parts), dtype_of(dtype))
            assert raw(tensor) == content[begin : begin + piece.nbytes]
        assert json.loads(raw(file.get_tensor(OBJECTS))) == DOCUMENTS
        table = raw(file.get_tensor(BLOCKS))
    assert digest.mismatches([memoryview(content)[: -len(table)]], 0, table) == []


@given(pieces())
def test_any_shard_opens_in_safetensors_with_our_bytes_under_our_names(tmp_path_factory, found: list[Piece]) -> None:
    check_opens(tmp_path_factory.getbasetemp() / "shard.safetensors", shardfile.place(found))


@pytest.mark.parametrize("dtype", sorted(ITEM_NBYTES))
def test_every_dtype_of_the_format_opens_in_safetensors(tmp_path: Path, dtype: str) -> None:
    check_opens(tmp_path / "shard.safetensors", shardfile.place([whole("w", dtype, 2, 3)]))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1)])
def test_a_tensor_without_dimensions_or_elements_is_stored(tmp_path: Path, shape: tuple[int, ...]) -> None:
    check_opens(tmp_path / "shard.safetensors", shardfile.place([whole("a", "F32", *shape), whole("b", "I8", 3)]))


def test_a_shard_without_tensors_is_legal(tmp_path: Path) -> None:
    check_opens(tmp_path / "shard.safetensors", shardfile.place([]))


def test_ten_thousand_pieces_open_in_safetensors(tmp_path: Path) -> None:
    found = [Piece(f"layers.{i}.w", "I8", (8, 4), (i % 8, 0), (1, 4)) for i in range(10_000)]
    check_opens(tmp_path / "shard.safetensors", shardfile.place(found))


def test_a_part_of_a_tensor_carries_its_box_in_its_name() -> None:
    assert whole("model.w", "F32", 8, 4).name == "model.w"
    assert Piece("model.w", "F32", (8, 4), (2, 0), (3, 4)).name == "model.w[2:5,0:4]"
    assert whole("step", "F32").name == "step"


@given(pieces())
def test_pieces_are_aligned_and_leave_no_gap(found: list[Piece]) -> None:
    placement = shardfile.place(found)
    assert placement.data_begin % PAGE_NBYTES == 0
    spans = [(begin, begin + piece.nbytes) for piece, begin in zip(placement.pieces, placement.begins, strict=True)]
    at, zeros = placement.padding
    if zeros:
        spans.insert(sum(piece.position is not None for piece in placement.pieces), (at, at + len(zeros)))
        assert not any(zeros)
    begins, ends = [begin for begin, _ in spans], [end for _, end in spans]
    assert [*begins, placement.tensors_end] == [placement.data_begin, *ends]
    for piece, begin in zip(placement.pieces, placement.begins, strict=True):
        assert begin % ITEM_NBYTES[piece.dtype] == 0
        assert piece.nbytes == math.prod(piece.sizes) * ITEM_NBYTES[piece.dtype]
    assert sorted(piece.name for piece in placement.pieces) == sorted(piece.name for piece in found)


@given(found=pieces(), data=st.data())
def test_the_order_in_which_pieces_come_does_not_move_them(found: list[Piece], data: st.DataObject) -> None:
    assert shardfile.place(data.draw(st.permutations(found))) == shardfile.place(found)


@given(found=pieces(), step=st.integers(0, 10**12 - 1), objects=st.integers(0, 10**12), rank=st.integers(0, 10**6))
def test_the_header_is_as_long_whatever_step_attempt_and_objects_are(
    found: list[Piece], step: int, objects: int, rank: int
) -> None:
    placement = shardfile.place(found)
    metadata = {"step": str(step), "attempt": "a" * 64, "rank": str(rank)}
    head = shardfile.header(placement, objects, metadata)
    assert len(head) == placement.data_begin
    assert shardfile.header_nbytes(PATH, head[:8], len(head) + 1) == len(head)


def test_a_header_of_any_length_has_room_for_the_longest_step_attempt_and_objects() -> None:
    longest = {"step": "9" * 12, "attempt": "a" * 64, "rank": "9" * 7}
    for length in range(1, 2 * PAGE_NBYTES, 7):
        placement = shardfile.place([whole("x" * length, "F32", 10**9)])
        assert len(shardfile.header(placement, 10**12, longest)) == placement.data_begin


def test_a_header_that_does_not_fit_is_never_written() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        shardfile.header(shardfile.place([]), 0, {"note": "x" * PAGE_NBYTES})


@given(found=pieces(), documents=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_the_documents_are_found_from_the_header_alone(found: list[Piece], documents: dict[str, str]) -> None:
    content = filled(shardfile.place(found), documents)
    body = len(content) - digest.table_nbytes(shardfile.place(found).tensors_end + len(json.dumps(documents)))
    length = shardfile.header_nbytes(PATH, content[:8], body)
    begin, end = shardfile.objects_range(PATH, content[:length], body)
    assert shardfile.documents(PATH, content[begin:end]) == documents


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, shardfile.MAX_HEADER_NBYTES + 1, 993])
def test_a_header_longer_than_its_file_is_refused_before_it_is_read(length: int) -> None:
    with pytest.raises(CorruptShardError, match=f"^{PATH}: header of {length} bytes in a body of 1000"):
        shardfile.header_nbytes(PATH, length.to_bytes(8, "little"), 1000)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"{}", b'{"__dcpsvc__.objects": 1}', b'{"__dcpsvc__.objects": {}}',
        b'{"__dcpsvc__.objects": {"data_offsets": 0}}', b'{"__dcpsvc__.objects": {"data_offsets": [0]}}',
        b'{"__dcpsvc__.objects": {"data_offsets": [0, 9]}}', b'{"__dcpsvc__.objects": {"data_offsets": [-1, 10]}}',
        b'{"__dcpsvc__.objects": {"data_offsets": [11, 10]}}', b'{"__dcpsvc__.objects": {"data_offsets": ["0", 10]}}',
        b'{"__dcpsvc__.objects": {"data_offsets": [0.0, 10]}}', b"[" * 10_000,
    ],
)  # fmt: skip
def test_a_header_that_is_not_ours_is_refused_with_the_file_named(text: bytes) -> None:
    head = bytes(8) + text
    with pytest.raises(CorruptShardError) as caught:
        shardfile.objects_range(PATH, head, len(head) + 10)
    assert caught.value.path == PATH


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff", b"{", b"[" * 100_000])
def test_documents_that_are_no_json_object_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptShardError) as caught:
        shardfile.documents(PATH, data)
    assert caught.value.path == PATH
