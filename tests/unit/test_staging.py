"""The arena is the image of the file: every tensor once, at its place, whatever its dtype, shape, strides and size."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from dcpsvc import copying
from dcpsvc.arena import Arena
from dcpsvc.format import digest, shardfile
from dcpsvc.format.layout import ITEM_NBYTES
from dcpsvc.format.shardfile import Piece
from dcpsvc.outline import Outline
from dcpsvc.stages import shard, stage
from dcpsvc.stages.stage import Gate, Snapshot
from dcpsvc.stages.stream import Stream
from dcpsvc.state.dtypes import dtype_of, name_of
from dcpsvc.state.saveplan import ShardPlan
from tests.unit.one_process import bits

if TYPE_CHECKING:
    from pathlib import Path

    from dcpsvc.format.manifest import ShardRecord

KIB, MIB = 2**10, 2**20
SECONDS = 30
KEY = "data/step-000000000007.1-cafecafe-0/rank-00000.safetensors"
COPIER = copying.thread()
ABOUT = {"step": "7", "attempt": "1-cafecafe-0", "rank": "0"}


def whole(key: str, tensor: torch.Tensor, dtype: str = "") -> Piece:
    shape = tuple(tensor.shape)
    return Piece(key, dtype or name_of(tensor.dtype, key), shape, (0,) * len(shape), shape)


def outline_of(tensors: dict[str, torch.Tensor], documents: Any = None, *, dtype: str = "") -> Outline:
    placement = shardfile.place(whole(key, tensor, dtype) for key, tensor in tensors.items())
    return Outline(placement, [tensors[name] for name in placement.names], documents or {}, ABOUT)


def save(path: Path, outline: Outline, staged: Snapshot | Stream | None = None) -> tuple[ShardRecord, bytes]:
    """As a save does it; the record and the file."""
    path.unlink(missing_ok=True)
    staged, plan = staged or Snapshot(outline, Arena(), COPIER), ShardPlan(outline.placement)
    writer = shard.ShardWriter(path, staged, plan, rank=0, key=KEY)
    begun = shard.begin(staged, stager=Gate(staged), plan=plan, writer=writer, process_group=None)
    begun.open()
    return begun.record(SECONDS), path.read_bytes()


# --- the format does not change ---------------------------------------------------------------------


def test_a_shard_is_to_the_last_byte_what_it_was(tmp_path: Path) -> None:
    """So no change of the format goes unnoticed."""
    count = 3 * MIB + 7
    tensors = {
        "b": torch.arange(5, dtype=torch.bfloat16),
        "m.t": torch.arange(60.0).view(6, 10).t(),
        "u": (torch.arange(count) % 251).to(torch.uint8),
        "z": torch.empty(0, 3),
        "s": torch.tensor(2.5, dtype=torch.float64),
        "cut[10:20,0:100]": torch.arange(1000.0).view(10, 100),
    }
    pieces = [whole(key, tensor) for key, tensor in tensors.items() if "[" not in key]
    placement = shardfile.place([*pieces, Piece("cut", "F32", (30, 100), (10, 0), (10, 100))])
    sources = [tensors[name] for name in placement.names]
    record, content = save(tmp_path / "f", Outline(placement, sources, {"sched": {"last": 7}, "rng@0": [1, 2]}, ABOUT))
    assert (record.nbytes, record.digest) == (3_154_187, "939d885cdb269f6153c3d6a3dd926807")
    assert hashlib.sha256(content).hexdigest() == "7dd3d5d92fa2b44ab749ff0917cf604b4f084834ad2e941cddd15bbc71b635be"


def test_an_empty_shard_is_too(tmp_path: Path) -> None:
    record, content = save(tmp_path / "f", Outline(shardfile.place([]), [], {}, {"step": "0"}))
    assert (record.nbytes, record.digest) == (4114, "be53da8d625f2cd1f6eaf0a143881e8b")
    assert hashlib.sha256(content).hexdigest() == "3fee346e83fb88a2fe1002d092060525db1856ab82df4795298a8b5a0cf9edfd"


def as_in_file(dtype: torch.dtype) -> torch.dtype:
    """What a safetensors reader makes of a dtype: its own, or one of the same bytes."""
    name = name_of(dtype, "x")
    return dtype_of(shardfile.FOREIGN.get(name, (name, ()))[0])


# --- image == file ----------------------------------------------------------------------------------


SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)
NAMES = st.text("abc.", min_size=1, max_size=4).filter(lambda name: not name.startswith("_"))


@st.composite
def tensors_of_any_kind(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key in draw(st.lists(NAMES, max_size=8, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(ITEM_NBYTES))), draw(SHAPES)
        tensor = torch.randint(0, 2, shape).to(dtype_of(dtype))
        found[key] = tensor.permute(draw(st.permutations(range(tensor.dim()))))
    return found


@given(tensors_of_any_kind(), st.dictionaries(NAMES, st.text(max_size=9), max_size=3))
@settings(max_examples=60, deadline=None)
def test_the_file_is_the_arena_and_its_table_and_any_safetensors_reader_finds_every_value(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor], documents: dict[str, str]
) -> None:
    outline = outline_of(tensors, documents)
    staged = Snapshot(outline, Arena(), COPIER)
    record, content = save(tmp_path_factory.getbasetemp() / "shard", outline, staged)

    image, table = bytes(staged.image), digest.table(staged.image)
    assert content == image + table
    assert record.digest == digest.digest(table)
    read = load(content)
    assert {key: (found.dtype, bits(found)) for key, found in read.items() if not key.startswith("__")} == {
        key: (as_in_file(tensor.dtype), bits(tensor)) for key, tensor in tensors.items()
    }
    assert json.loads(bytes(read[shardfile.OBJECTS].numpy())) == documents


BORDERS = [border + more for border in (MIB, 16 * MIB, 64 * MIB) for more in (-1, 0, 1, 4096)]


@pytest.mark.parametrize("body_nbytes", [4096 + 2, 8191, 8192, 8193, *BORDERS])
def test_a_shard_of_any_size_is_whole(tmp_path: Path, body_nbytes: int) -> None:
    """The borders of a page, a block, and what one call writes."""
    numel = body_nbytes - 4096 - len("{}")
    outline = outline_of({"w": (torch.arange(numel) % 253).to(torch.uint8)})
    staged = Snapshot(outline, Arena(), COPIER)
    assert outline.nbytes == body_nbytes
    record, content = save(tmp_path / "shard", outline, staged)
    assert record.body_nbytes == body_nbytes
    assert content[:body_nbytes] == staged.image
    assert content[body_nbytes:] == digest.table(staged.image)


def test_an_arena_that_was_used_before_gives_the_same_file(tmp_path: Path) -> None:
    arena, tensors = Arena(), {"a": torch.randn(3000), "b": torch.randn(7).bfloat16(), "c": torch.empty(0)}
    _, fresh = save(tmp_path / "fresh", outline_of(tensors, {"text": "x"}))
    save(tmp_path / "other", outline_of({"a": torch.ones(5000)}, {"text": "x" * 5000}), None)
    used = outline_of({"a": torch.ones(5000)}, {"text": "x" * 5000})
    save(tmp_path / "first", used, Snapshot(used, arena, COPIER))
    again = outline_of(tensors, {"text": "x"})
    assert save(tmp_path / "second", again, Snapshot(again, arena, COPIER))[1] == fresh


# --- many small tensors -----------------------------------------------------------------------------


def test_more_tensors_than_one_call_copies_all_arrive() -> None:
    tensors = {f"{number:05d}": torch.full((number % 3,), number, dtype=torch.int32) for number in range(9000)}
    staged = Snapshot(outline_of(tensors), Arena(), COPIER)
    staged.stage()
    for key in ("00000", "00001", "04095", "04096", "04097", "08192", "08999"):
        assert staged.piece(key).tolist() == tensors[key].tolist()
    assert sum(int(staged.piece(key).sum()) for key in list(tensors)[::50]) == sum(
        int(tensor.sum()) for tensor in list(tensors.values())[::50]
    )


@given(st.lists(st.integers(0, 3).map(lambda tenths: tenths * 100 * MIB), max_size=30))
def test_every_tensor_is_in_one_batch_and_no_batch_is_long(sizes: list[int]) -> None:
    placement = shardfile.place(
        Piece(f"{number:03d}", "U8", (nbytes,), (0,), (nbytes,)) for number, nbytes in enumerate(sizes)
    )
    batches = list(stage._batches(placement, 0, len(sizes)))
    assert list(itertools.chain.from_iterable(range(len(sizes))[batch] for batch in batches)) == list(range(len(sizes)))
    assert all(sum(piece.nbytes for piece in placement.pieces[batch][:-1]) <= 256 * MIB for batch in batches)


@pytest.mark.parametrize("kind", [Snapshot, Stream])
def test_dcp_is_never_given_tensors_one_by_one(kind: type[Snapshot | Stream]) -> None:
    """It would log twice for each, on the training thread too."""
    outline = outline_of({f"{number}": torch.ones(1) for number in range(100)})
    staged = Snapshot(outline, Arena(), COPIER) if kind is Snapshot else Stream(outline, MIB)
    assert len(staged.given) <= 1


def test_nothing_of_the_state_is_held_once_it_is_copied() -> None:
    outline = outline_of({"w": torch.ones(5)})
    Snapshot(outline, Arena(), COPIER).stage()
    assert outline.sources == []


# --- another dtype in the file ----------------------------------------------------------------------


def test_a_copy_into_a_narrower_dtype_is_the_cast_one_staged_or_streamed(tmp_path: Path) -> None:
    torch.manual_seed(1)
    tensors = {"w": torch.randn(700, 300), "turned": torch.randn(300, 700).t(), "small": torch.randn(5)}
    narrow = outline_of({key: tensor.bfloat16() for key, tensor in tensors.items()})
    _, expected = save(tmp_path / "expected", narrow)
    _, staged = save(tmp_path / "staged", outline_of(tensors, dtype="BF16"))
    left = outline_of(tensors, dtype="BF16")
    _, streamed = save(tmp_path / "streamed", left, Stream(left, MIB))
    assert staged == expected
    assert streamed == expected


# --- what DCP is told -------------------------------------------------------------------------------


def test_dcp_hears_of_every_piece_its_size_and_place_and_what_is_told_is_made_once(tmp_path: Path) -> None:
    outline = outline_of({"a": torch.randn(3, 4), "b": torch.ones(5, dtype=torch.int8)})
    plan, staged = ShardPlan(outline.placement), Snapshot(outline, Arena(), COPIER)
    writer = shard.ShardWriter(tmp_path / "shard", staged, plan, rank=0, key=KEY)
    begun = shard.begin(staged, stager=Gate(staged), plan=plan, writer=writer, process_group=None)
    begun.open()
    metadata = begun._written.result(SECONDS)
    assert metadata is plan.metadata
    assert {key: tuple(found.size) for key, found in metadata.state_dict_metadata.items()} == {"a": (3, 4), "b": (5,)}
    assert [item.index.fqn for item in plan.local.items] == list(outline.placement.names)
    assert [(each.size_in_bytes, each.storage_data) for each in plan.results] == [
        (piece.nbytes, begin) for piece, begin in zip(outline.placement.pieces, outline.placement.begins, strict=True)
    ]


def test_what_the_header_says_is_the_file(tmp_path: Path) -> None:
    outline = outline_of({"a": torch.arange(6.0).view(2, 3)})
    _, content = save(tmp_path / "shard", outline)
    (length,) = struct.unpack("<Q", content[:8])
    entry = json.loads(content[8 : 8 + length])["a"]
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    assert (entry["dtype"], entry["shape"]) == ("F32", [2, 3])
    assert content[begin:end] == bits(torch.arange(6.0))
