"""How a file is cut into parts, and what of it an earlier one has: laws for any sizes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dcpsvc.format.digest import DIGEST_NBYTES, table
from dcpsvc.storage.parts import MAX_PARTS, MIN_PART_NBYTES, cut
from dcpsvc.storage.unchanged import equal_runs

MIB = 2**20


@st.composite
def files(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], int]:
    """Size, unchanged ranges, size of a part."""
    blocks = draw(st.lists(st.booleans(), min_size=1, max_size=300))
    nbytes = len(blocks) * MIB + draw(st.integers(0, MIB - 1))
    runs = [(at * MIB, (at + 1) * MIB) for at, same in enumerate(blocks) if same]
    joined: list[tuple[int, int]] = []
    for begin, end in runs:
        joined.append((joined.pop()[0], end) if joined and joined[-1][1] == begin else (begin, end))
    return nbytes, joined, draw(st.integers(5, 40)) * MIB


@given(files())
def test_the_parts_cover_the_file_in_order_and_every_server_takes_their_sizes(
    file: tuple[int, list[tuple[int, int]], int],
) -> None:
    nbytes, runs, part_nbytes = file
    spans = cut(nbytes, part_nbytes, runs)
    assert [span.number for span in spans] == list(range(1, len(spans) + 1))
    assert (spans[0].begin, spans[-1].end) == (0, nbytes)
    assert all(one.end == other.begin for one, other in pairwise(spans))
    assert all(span.begin % MIB == 0 for span in spans)
    sizes = [span.end - span.begin for span in spans]
    assert all(size >= MIN_PART_NBYTES for size in sizes[:-1])
    assert max(sizes) <= max(part_nbytes, 2 * MIN_PART_NBYTES)
    assert spans == cut(nbytes, part_nbytes, list(runs))


@given(files())
def test_only_what_is_unchanged_is_copied_and_of_each_long_run_all_but_a_part(
    file: tuple[int, list[tuple[int, int]], int],
) -> None:
    nbytes, runs, part_nbytes = file
    copied = [span for span in cut(nbytes, part_nbytes, runs) if span.unchanged]
    for span in copied:
        assert any(begin <= span.begin and span.end <= end for begin, end in runs)
    for begin, end in runs:
        within = sum(span.end - span.begin for span in copied if begin <= span.begin < end)
        assert within == 0 or within > end - begin - MIN_PART_NBYTES
        assert within > 0 or end - begin < 2 * MIN_PART_NBYTES


def test_a_file_for_more_parts_than_a_server_takes_gets_larger_ones() -> None:
    spans = cut(400_000 * MIB, 16 * MIB)
    assert len(spans) <= MAX_PARTS
    scattered = [(at * MIB, (at + 5) * MIB) for at in range(5, 120_000, 10)]
    assert len(cut(120_000 * MIB, 16 * MIB, scattered)) <= MAX_PARTS


@given(st.binary(min_size=1, max_size=40), st.sets(st.integers(0, 39)), st.integers(0, MIB - 1))
def test_runs_are_the_blocks_that_are_the_same(pattern: bytes, changed: set[int], rest: int) -> None:
    entries = [bytes([value]) * DIGEST_NBYTES for value in pattern]
    others = [b"x" * DIGEST_NBYTES if at in changed else entry for at, entry in enumerate(entries)]
    body_nbytes = len(entries) * MIB - rest
    runs = equal_runs(b"".join(entries), b"".join(others), body_nbytes)
    same = {at for at, (one, other) in enumerate(zip(entries, others, strict=True)) if one == other}
    whole = set(range(body_nbytes // MIB))
    assert {at // MIB for begin, end in runs for at in range(begin, end, MIB)} == same & whole
    assert all(one[1] < other[0] for one, other in pairwise(runs))


def test_a_body_has_all_blocks_in_common_with_itself_but_for_a_piece_at_the_end() -> None:
    body = memoryview(bytes(3 * MIB + 7))
    assert equal_runs(table(body), table(body), len(body)) == ((0, 3 * MIB),)
