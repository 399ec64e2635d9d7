"""A layout tiles its tensors exactly and lies inside its shards, or the checkpoint is refused with a typed error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dcpsvc
from dcpsvc import Checkpointer
from dcpsvc.errors import LayoutError, NoSuchStepError, NoValidCheckpointError
from dcpsvc.format import layout, manifest
from dcpsvc.format.digest import digest
from dcpsvc.format.layout import Chunk, Tensor
from dcpsvc.format.tiling import uncovered
from tests.unit.one_process import resume, save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Box = tuple[tuple[int, ...], tuple[int, ...]]
PATH = f"layouts/{'0' * 32}.json"


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that tile it: cut at random, again and again."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        splittable = [dim for dim, size in enumerate(sizes) if size > 1]
        if not splittable:
            boxes.append((offsets, sizes))
            continue
        dim = draw(st.sampled_from(splittable))
        at = draw(st.integers(1, sizes[dim] - 1))
        boxes.append((offsets, (*sizes[:dim], at, *sizes[dim + 1 :])))
        boxes.append(
            (
                (*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :]),
                (*sizes[:dim], sizes[dim] - at, *sizes[dim + 1 :]),
            )
        )
    return shape, draw(st.permutations(boxes))


@st.composite
def heaps(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes thrown into it."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))

    def box() -> Box:
        offsets = tuple(draw(st.integers(0, extent - 1)) for extent in shape)
        return offsets, tuple(draw(st.integers(1, extent - at)) for at, extent in zip(offsets, shape, strict=True))

    return shape, [box() for _ in range(draw(st.integers(1, 4)))]


def described(shape: tuple[int, ...], boxes: list[Box]) -> Tensor:
    return Tensor.of("F32", shape, (Chunk(rank, *box, 4096) for rank, box in enumerate(boxes)))


def loads(shape: tuple[int, ...], boxes: list[Box]) -> layout.Layout:
    content = {"format": 1, "aliases": {}, "tensors": {"w": ["F32", shape, [[0, *box, 4096] for box in boxes]]}}
    data = json.dumps(content).encode()
    return layout.loads(PATH, data, digest(data))


def is_tiled(shape: tuple[int, ...], boxes: list[Box]) -> bool:
    """Counted element by element."""
    covered = torch.zeros(shape, dtype=torch.int64)
    for offsets, sizes in boxes:
        covered[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))] += 1
    return bool((covered == 1).all())


@given(tilings())
def test_every_tiling_is_accepted(tiling: tuple[tuple[int, ...], list[Box]]) -> None:
    assert uncovered(described(*tiling)) is None
    assert len(loads(*tiling).tensors["w"].chunks) == len(tiling[1])


@given(heaps())
def test_boxes_are_accepted_exactly_when_they_hold_each_element_once(heap: tuple[tuple[int, ...], list[Box]]) -> None:
    assert (uncovered(described(*heap)) is None) == is_tiled(*heap)


@given(tilings(), st.data())
def test_a_tiling_with_one_box_moved_over_another_is_refused(
    tiling: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, boxes = tiling
    dims = [dim for dim, extent in enumerate(shape) for box in boxes if box[1][dim] < extent]
    if not dims:
        return
    movable = [n for n, (_, sizes) in enumerate(boxes) if any(sizes[dim] < shape[dim] for dim in dims)]
    number = data.draw(st.sampled_from(movable))
    offsets, sizes = boxes[number]
    dim = data.draw(st.sampled_from([dim for dim in dims if sizes[dim] < shape[dim]]))
    places = [at for at in range(shape[dim] - sizes[dim] + 1) if at != offsets[dim]]
    moved = (*offsets[:dim], data.draw(st.sampled_from(places)), *offsets[dim + 1 :])
    with pytest.raises(LayoutError, match="w: "):
        loads(shape, [*boxes[:number], (moved, sizes), *boxes[number + 1 :]])


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((4,), [((0,), (3,)), ((2,), (1,))]),
        ((4,), [((0,), (2,)), ((1,), (2,))]),
        ((2, 2), [((0, 0), (1, 2)), ((0, 0), (2, 1))]),
        ((3, 3), [((0, 0), (2, 2)), ((1, 1), (2, 2)), ((0, 2), (1, 1))]),
    ],
)
def test_an_overlap_that_hides_a_gap_of_its_size_is_refused(shape: tuple[int, ...], boxes: list[Box]) -> None:
    with pytest.raises(LayoutError, match="overlap"):
        loads(shape, boxes)


@pytest.mark.parametrize("depth", [10, 900, 1000, 1100, 100_000])
@pytest.mark.parametrize("place", ["shape", "dtype", "alias"])
def test_a_layout_nested_too_deep_is_only_ever_a_layout_error(depth: int, place: str) -> None:
    deep = "[" * depth + "]" * depth
    text = {
        "shape": f'{{"format":1,"aliases":{{}},"tensors":{{"x":["F32",{deep},[]]}}}}',
        "dtype": f'{{"format":1,"aliases":{{}},"tensors":{{"x":[{deep},[],[[0,[],[],0]]]}}}}',
        "alias": f'{{"format":1,"aliases":{{"a":{deep}}},"tensors":{{}}}}',
    }
    data = text[place].encode()
    with pytest.raises(LayoutError):
        layout.loads(PATH, data, digest(data))


# --- places that no shard has -----------------------------------------------------------------------


def relay(root: Path, step: int, change: Callable[[list[Any]], None]) -> None:
    """Give a commit another layout, sealed like ours, in which the first chunk of ``x`` lies elsewhere."""
    (path,) = (root / "manifests").glob(f"*.step-{step:012d}.*")
    found = json.loads(path.read_bytes())
    content = json.loads((root / "layouts" / f"{found['layout']['digest']}.json").read_bytes())
    change(content["tensors"]["x"][2][0])
    data = json.dumps(content).encode()
    (root / "layouts" / f"{digest(data)}.json").write_bytes(data)
    del found["digest"]
    path.write_bytes(manifest.seal(found | {"layout": {"digest": digest(data), "nbytes": len(data)}}))


def of_rank_5(chunk: list[Any]) -> None:
    chunk[0] = 5


def behind_the_end(chunk: list[Any]) -> None:
    chunk[3] = 10**6


def over_the_end(chunk: list[Any]) -> None:
    chunk[3] += 4096


PLACES = [of_rank_5, behind_the_end, over_the_end]


@pytest.mark.parametrize("place", PLACES)
def test_a_chunk_that_lies_in_no_shard_is_a_typed_error_that_names_it(tmp_path: Path, place: Any) -> None:
    save(tmp_path, {"x": torch.ones(4)})
    relay(tmp_path / "root", 1, place)
    target = torch.zeros(4)
    for call, error in (
        (lambda: dcpsvc.load(tmp_path / "root", {"x": target}), NoValidCheckpointError),
        (lambda: dcpsvc.load(tmp_path / "root", {"x": target}, 1), NoSuchStepError),
        (lambda: resume(tmp_path, {"x": target}), NoValidCheckpointError),
    ):
        with pytest.raises(error, match="x: a chunk lies outside the shard of rank"):
            call()
    with pytest.raises(LayoutError):
        dcpsvc.storage_reader(tmp_path / "root")
    assert torch.equal(target, torch.zeros(4))


@pytest.mark.parametrize("place", PLACES)
def test_resume_passes_over_a_commit_whose_layout_leaves_its_shards(tmp_path: Path, place: Any) -> None:
    save(tmp_path, {"x": torch.ones(4)}, step=1)
    save(tmp_path, {"x": torch.ones(4) * 2}, step=2)
    relay(tmp_path / "root", 2, place)
    target = torch.zeros(4)
    assert resume(tmp_path, {"x": target}) == 1
    assert torch.equal(target, torch.ones(4))


# --- a layout that has rotted -----------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
def test_a_rotten_layout_is_mended_by_the_next_job_and_all_older_commits_load_again(
    tmp_path: Path, damage: str
) -> None:
    for step in (1, 2):
        save(tmp_path, {"x": torch.full((4,), float(step))}, step=step)
    (path,) = (tmp_path / "root" / "layouts").iterdir()
    whole = path.read_bytes()
    match damage:
        case "flipped":
            path.write_bytes(whole.replace(b"F32", b"I32"))
        case "truncated":
            path.write_bytes(whole[:-9])
        case _:
            path.unlink()
    with pytest.raises(NoValidCheckpointError, match="layout"):
        resume(tmp_path, {"x": torch.zeros(4)})
    with Checkpointer(tmp_path / "root", {"x": torch.full((4,), 3.0)}, local=tmp_path / "local") as ckpt:
        ckpt.save(3).wait(30)
    assert path.read_bytes() == whole
    for step in (1, 2, 3):
        target = torch.zeros(4)
        assert dcpsvc.load(tmp_path / "root", {"x": target}, step) == step
        assert torch.equal(target, torch.full((4,), float(step)))
