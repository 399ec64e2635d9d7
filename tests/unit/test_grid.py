"""Numbers by a rule: the rule gives exactly the numbers it was made of, and is short where there is one."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dcpsvc.format.grid import Grid, Level, fold

small = st.integers(-6, 6)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    length = draw(st.integers(1, 3))
    vectors = st.tuples(*[small] * length)
    levels = draw(st.lists(st.builds(Level, st.integers(2, 4), vectors), max_size=3))
    return Grid(draw(vectors), tuple(levels))


@given(st.integers(1, 3).flatmap(lambda length: st.lists(st.tuples(*[st.integers(0, 3)] * length), max_size=12)))
def test_what_was_folded_unfolds_in_its_order(vectors: list[tuple[int, ...]]) -> None:
    assert [vector for grid in fold(vectors) for vector in grid.vectors()] == vectors


@given(grids())
def test_a_grid_has_as_many_vectors_as_it_says_within_its_bounds(grid: Grid) -> None:
    vectors = list(grid.vectors())
    assert len(vectors) == grid.number
    assert grid.bounds() == (tuple(map(min, zip(*vectors, strict=True))), tuple(map(max, zip(*vectors, strict=True))))


@given(grids(), st.data())
def test_what_lies_between_is_found_in_order(grid: Grid, data: st.DataObject) -> None:
    low = [data.draw(small) for _ in grid.first]
    high = [at + data.draw(st.integers(-1, 12)) for at in low]
    among = [v for v in grid.vectors() if all(a <= x <= b for a, x, b in zip(low, v, high, strict=True))]
    assert list(grid.between(low, high)) == among


def test_one_mesh_is_one_grid_of_as_many_levels_as_it_has_dimensions() -> None:
    line = [(rank, 3 * rank, 0) for rank in range(4096)]
    assert fold(line) == [Grid((0, 0, 0), (Level(4096, (1, 3, 0)),))]
    mesh = [(8 * row + column, 5 * row, 7 * column) for row, column in itertools.product(range(512), range(8))]
    assert fold(mesh) == [Grid((0, 0, 0), (Level(8, (1, 0, 7)), Level(512, (8, 5, 0))))]


def test_of_thousands_no_more_are_looked_at_than_are_found() -> None:
    asked = 0

    class Counted(Grid):
        def between(self, low, high):
            nonlocal asked
            asked += 1
            return super().between(low, high)

    (grid,) = fold((rank, 3 * rank) for rank in range(100_000))
    assert list(Counted(*grid).between([0, 300], [1 << 20, 309])) == [(100, 300), (101, 303), (102, 306), (103, 309)]
    assert asked == 1  # the four below it are plain ones
