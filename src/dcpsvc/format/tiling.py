"""Whether chunks cover their tensor exactly: every element once, and nothing else."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import TYPE_CHECKING

from dcpsvc.format.grid import Grid, Level

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dcpsvc.format.layout import Run, Shape, Tensor

    Box = tuple[Shape, Shape]
    """Offsets and sizes."""

MAX_CUT_DIMS = 8
MAX_CHUNKS = 1 << 22
"""Of one tensor: a file of a few bytes may name more than can be looked at."""


def uncovered(tensor: Tensor) -> str | None:
    """Why the chunks are no exact cover of their tensor; None if they are."""
    if len(tensor.runs) == 1 and tensor.runs[0].is_whole(tensor.shape):
        return None
    if (count := sum(run.grid.number for run in tensor.runs)) > MAX_CHUNKS:
        return f"{count} chunks, at most {MAX_CHUNKS} are read"
    stored = sum(run.numel for run in tensor.runs)
    if stored != math.prod(tensor.shape):
        why = "; ranks that hold the same Part have to give it their group" if stored > math.prod(tensor.shape) else ""
        return f"chunks hold {stored} of {math.prod(tensor.shape)} elements{why}"
    for run in tensor.runs:
        low, high = (bound[1:-1] for bound in run.grid.bounds())
        box = zip(high, run.sizes, tensor.shape, strict=True)
        if min(low, default=0) < 0 or any(offset + size > extent for offset, size, extent in box):
            return f"a chunk at {high} of size {run.sizes} leaves the shape {tensor.shape}"
    return _not_tiled(tensor.shape, [box for run in tensor.runs if run.numel for box in _boxes(run)])


def _boxes(run: Run) -> Iterator[Box]:
    """What a run covers: chunks that lie side by side as one."""
    sizes, apart = list(run.sizes), [Level(count, steps[1:-1]) for count, steps in run.grid.levels]
    while (beside := next((level for level in apart if _is_beside(level, sizes)), None)) is not None:
        apart.remove(beside)
        sizes = [size + step * (beside.number - 1) for size, step in zip(sizes, beside.steps, strict=True)]
    for offsets in Grid(run.grid.first[1:-1], tuple(apart)).vectors():
        yield offsets, tuple(sizes)


def _is_beside(level: Level, sizes: Sequence[int]) -> bool:
    along = [dim for dim, step in enumerate(level.steps) if step]
    return len(along) == 1 and level.steps[along[0]] == sizes[along[0]]


def _not_tiled(shape: Shape, boxes: list[Box]) -> str | None:
    """Boxes tile a box exactly when their corners, counted with alternating signs, are those of the whole."""
    cut = [dim for dim, extent in enumerate(shape) if any(sizes[dim] != extent for _, sizes in boxes)]
    if len(cut) > MAX_CUT_DIMS:
        return f"cut along {len(cut)} dimensions, at most {MAX_CUT_DIMS} are supported"
    if len(cut) == 1:
        return _not_in_a_row(boxes, cut[0])
    corners: Counter[Shape] = Counter()
    whole = [((0,) * len(shape), shape, -1)] if boxes else []
    for offsets, sizes, sign in [*((*box, 1) for box in boxes), *whole]:
        for far in itertools.product((False, True), repeat=len(cut)):
            corner = tuple(offsets[dim] + sizes[dim] * at_end for dim, at_end in zip(cut, far, strict=True))
            corners[corner] += sign * (-1) ** sum(far)
    if any(corners.values()):
        return "chunks overlap and leave gaps"
    return None


def _not_in_a_row(boxes: list[Box], dim: int) -> str | None:
    """The same for boxes that are cut along one dimension, as nearly all are; they hold as much as the whole."""
    ends = 0
    for offset, size in sorted((offsets[dim], sizes[dim]) for offsets, sizes in boxes):
        if offset != ends:
            return "chunks overlap and leave gaps"
        ends += size
    return None
