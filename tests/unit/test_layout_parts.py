"""Parts: however a state is cut, the ranks' parts make the layout; what many would say alike is said once."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc.errors import LayoutError
from dcpsvc.format import layout, parts, shardfile
from dcpsvc.format.digest import digest
from dcpsvc.format.layout import ITEM_NBYTES, Chunk, Layout, Tensor
from dcpsvc.format.shardfile import Piece
from dcpsvc.format.tiling import uncovered

if TYPE_CHECKING:
    from dcpsvc.format.parts import Part

PATH = "layouts/x.json"


def cut(extent: int, ways: int, place: int) -> tuple[int, int]:
    """Offset and size of one part as ``torch.chunk`` cuts: of equal size, the last ones smaller or empty."""
    size = -(-extent // ways)
    begin = min(place * size, extent)
    return begin, min(size, extent - begin)


def piece(key: str, dtype: str, shape: tuple[int, ...], ways: tuple[int, ...], at: tuple[int, ...]) -> Piece | None:
    """A place of a mesh has the part of a tensor cut along its first dimensions; None if nothing is left for it."""
    cuts = [cut(extent, n, place) for extent, n, place in zip(shape, ways, at, strict=False)]
    offsets = (*(begin for begin, _ in cuts), *(0 for _ in shape[len(cuts) :]))
    sizes = (*(size for _, size in cuts), *shape[len(cuts) :])
    return None if 0 in sizes else Piece(key, dtype, shape, offsets, sizes)


@st.composite
def jobs(draw: st.DrawFn) -> list[list[Piece]]:
    """What each rank writes: tensors over a mesh of one or two dimensions, others on one rank, others end to end."""
    ways = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=2)))
    places = list(itertools.product(*map(range, ways)))
    found: list[list[Piece]] = [[] for _ in places]
    dtypes = st.sampled_from(["F32", "BF16", "U8", "C128"])
    for number in range(draw(st.integers(0, 5))):
        shape, dtype = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=3))), draw(dtypes)
        for rank, at in enumerate(places):
            if (one := piece(f"sharded.{number}", dtype, shape, ways, at)) is not None:
                found[rank].append(one)
    for number in range(draw(st.integers(0, 3))):
        rank, shape = draw(st.integers(0, len(places) - 1)), tuple(draw(st.lists(st.integers(0, 4), max_size=2)))
        found[rank].append(Piece(f"own.{number}", draw(dtypes), shape, (0,) * len(shape), shape))
    rows, low = [draw(st.integers(0, 3)) for _ in places], 0
    for rank, count in enumerate(rows):
        if count:
            found[rank].append(Piece("rows", "F32", (sum(rows), 2), (low, 0), (count, 2)))
            low += count
    return found


def said(job: list[list[Piece]]) -> list[Part]:
    return [parts.part(shardfile.place(pieces), rank, {"head": "own.0"}) for rank, pieces in enumerate(job)]


def merged(heard: list[Part]) -> Layout:
    owns = [part.own for part in heard]
    speakers = parts.speakers(owns)
    return parts.merge(owns, {name: heard[rank].common for name, rank in speakers.items()})


def flat(job: list[list[Piece]]) -> dict[str, Any]:
    """Written out, chunk by chunk."""
    found: dict[str, Any] = {}
    for rank, pieces in enumerate(job):
        placement = shardfile.place(pieces)
        for one, begin in zip(placement.pieces, placement.begins, strict=True):
            chunk = Chunk(rank, one.offsets, one.sizes, begin)
            found.setdefault(one.key, (one.dtype, one.shape, set()))[2].add(chunk)
    return found


@given(jobs())
def test_the_parts_of_all_ranks_make_the_layout_chunk_by_chunk(job: list[list[Piece]]) -> None:
    made = merged(said(job))
    assert {key: (t.dtype, t.shape, set(t.chunks)) for key, t in made.tensors.items()} == flat(job)
    assert made.aliases == {"head": "own.0"}
    ends: dict[int, int] = {}
    for one in made.tensors.values():
        for chunk in one.chunks:
            end = chunk.begin + chunk.numel * ITEM_NBYTES[one.dtype]
            ends[chunk.rank] = max(end, ends.get(chunk.rank, 0))
    assert {rank: end for rank, (end, _) in made.ends().items()} == ends
    if "own.0" in made.tensors:
        assert layout.loads(PATH, made.dumps(), digest(made.dumps())) == made


@given(jobs(), st.data())
def test_the_chunks_that_hold_some_of_a_box_are_found(job: list[list[Piece]], data: st.DataObject) -> None:
    made = merged(said(job))
    for tensor in made.tensors.values():
        offsets = tuple(data.draw(st.integers(0, extent)) for extent in tensor.shape)
        sizes = tuple(data.draw(st.integers(0, e - at)) for e, at in zip(tensor.shape, offsets, strict=True))
        holding = {
            chunk
            for chunk in tensor.chunks
            if all(
                max(a, b) < min(a + m, b + n)
                for a, m, b, n in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
            )
        }
        found = list(tensor.overlapping(offsets, sizes))
        assert len(found) == len(set(found))
        assert holding <= set(found)
        if 0 not in sizes:
            assert {chunk for chunk in found if chunk.numel} == holding


@given(jobs(), st.data())
def test_a_part_that_is_missing_or_comes_twice_is_refused(job: list[list[Piece]], data: st.DataObject) -> None:
    heard = said(job)
    number = data.draw(st.integers(0, len(heard) - 1))
    if not any(one.nbytes for one in job[number]):
        return
    missing = [part for rank, part in enumerate(heard) if rank != number]
    left = {key for rank, pieces in enumerate(job) if rank != number for key in (one.key for one in pieces)}
    if left & {one.key for one in job[number] if one.nbytes}:
        with pytest.raises(LayoutError, match=r"elements|overlap"):
            merged(missing)
    with pytest.raises(LayoutError, match=r"elements|overlap"):
        merged([*heard, heard[number]])


def model(ranks: int, tensors: int) -> list[list[Piece]]:
    """FSDP over all ranks, and per rank a generator and perhaps a step counter, as their owners would have them."""
    found: list[list[Piece]] = []
    for rank in range(ranks):
        cuts = (piece(f"layers.{n}.w", "BF16", (ranks + n % 3, 4), (ranks,), (rank,)) for n in range(tensors))
        own = [Piece(f"rng@{rank}", "U8", (5000 + rank % 2,), (0,), (5000 + rank % 2,))]
        if rank == 0:
            own.append(Piece("own.0", "F32", (3, 3), (0, 0), (3, 3)))
        if rank < tensors:
            own.append(Piece(f"layers.{rank}.step", "F32", (), (), ()))
        found.append([*(one for one in cuts if one is not None), *own])
    return found


def test_what_thousands_of_ranks_have_in_common_is_said_by_a_few_and_kept_as_a_few_runs() -> None:
    ranks, tensors = 1000, 40
    heard = said(model(ranks, tensors))
    speakers = parts.speakers([part.own for part in heard])
    assert len(speakers) <= 6
    assert max(len(part.own) for part in heard) < 400
    made = merged(heard)
    runs = [len(t.runs) for key, t in made.tensors.items() if key.endswith(".w")]
    assert (len(runs), max(runs) <= 6) == (tensors, True)
    assert len(made.dumps()) < 200 * (ranks + tensors * 6)
    reread = layout.loads(PATH, made.dumps(), digest(made.dumps()))
    assert reread.ends() == made.ends()
    assert sorted(made.ends()) == list(range(ranks))


@pytest.mark.parametrize(
    "run",
    [
        [0, [0], [1], 0, [[4, 1, [1], 0], [2, 0, [0]]]],  # steps of another length
        [0, [0], [1], 0, [[1, 1, [1], 0]]],  # a level of one
        [0, [0], [1], 0, [[4, 1, [1], True]]],
        [0, [0], [1], 0, [[4, 1, [1.0], 0]]],
        [0, [0], [1], 0, [[4, -1, [1], 0]]],  # rank -3
        [0, [3], [1], 0, [[4, 1, [-2], 0]]],  # an offset below 0
        [0, [0], [1], 0, [[4, 1, [1], -5]]],
        [0, [0], [1], 0, [[4, 1 << 20, [1], 0]]],  # ranks that cannot be
        [0, [0], [1], 0, [[4, 1, [2], 0]]],  # leaves the shape
        [0, [0], [0], 0, [[1 << 22, 0, [0], 0], [1 << 22, 0, [0], 0]]],  # more chunks than can be looked at
        [0, [0], [1], 0, [[2, 0, [0], 0]] * 40],
        [0, [0], [1], 0, [[1 << 21, 0, [1 << 22], 0], [1 << 21, 0, [1], 0]]],
        [0, [0], [1], 0, 7],
        [0, [0], [1], 0, [7]],
    ],
)
def test_a_run_that_makes_no_sense_is_refused_before_it_is_expanded(run: Any) -> None:
    tensors = {"w": ["F32", [4], [run]]}
    data = json.dumps({"format": 1, "aliases": {}, "tensors": tensors}).encode()
    with pytest.raises(LayoutError, match="w: "):
        layout.loads(PATH, data, digest(data))


def test_a_tensor_keeps_the_order_of_its_chunks() -> None:
    chunks = [Chunk(rank, (at,), (1,), 8 * at) for rank, at in enumerate((3, 1, 0, 2, 4, 5, 6))]
    tensor = Tensor.of("U8", (7,), chunks)
    assert list(tensor.chunks) == chunks
    assert uncovered(tensor) is None


def test_runs_that_together_name_more_chunks_than_can_be_looked_at_are_refused_at_a_glance() -> None:
    """Each for itself is not too large; the file has 300 bytes."""
    half = 1 << 21
    runs = [[0, [at], [1], 0, [[half, 0, [4], 0]]] for at in range(4)]
    data = json.dumps({"format": 1, "aliases": {}, "tensors": {"w": ["U8", [4 * half], runs]}}).encode()
    with pytest.raises(LayoutError, match="w: 8388608 chunks, at most 4194304 are read"):
        layout.loads(PATH, data, digest(data))
