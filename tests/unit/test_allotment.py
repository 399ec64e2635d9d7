"""Who reads what for whom: all that is needed arrives once, the root gives each byte once, and all read as much."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpsvc import allotment
from dcpsvc.allotment import ROUND_NBYTES, UNIT_NBYTES, Ask, Unit

if TYPE_CHECKING:
    from collections.abc import Iterable

BLOCK = 1 << 20
BODIES = {0: 20 * BLOCK - 17, 1: 3 * BLOCK, 2: 9 * BLOCK + 1}


@st.composite
def runs(draw: st.DrawFn, shard: int) -> list[tuple[int, int]]:
    """Disjoint ascending ranges of whole blocks, the last cut off where the body ends."""
    count = -(-BODIES[shard] // BLOCK)
    edges = sorted(draw(st.sets(st.integers(0, count), max_size=6)))
    pairs = zip(edges[::2], edges[1::2], strict=False)
    return [(begin * BLOCK, min(end * BLOCK, BODIES[shard])) for begin, end in pairs]


@st.composite
def an_ask(draw: st.DrawFn) -> Ask:
    needs = {shard: found for shard in BODIES if (found := draw(runs(shard)))}
    has = frozenset(draw(st.sets(st.sampled_from(sorted(BODIES)))))
    return Ask(has, needs, draw(st.sampled_from(["", "x"])))


asks = st.lists(an_ask(), min_size=1, max_size=5)


def blocks(shard: int, ranges: Iterable[tuple[int, int]]) -> Counter[tuple[int, int]]:
    return Counter((shard, at) for begin, end in ranges for at in range(begin, end, BLOCK))


def needed(ask: Ask) -> Counter[tuple[int, int]]:
    return sum((blocks(shard, found) for shard, found in ask.needs.items()), Counter())


@settings(max_examples=50)
@given(asks)
def test_every_rank_gets_each_block_it_needs_exactly_once_and_no_other(said: list[Ask]) -> None:
    units = allotment.allot(said, BODIES)
    for rank, ask in enumerate(said):
        own = sum((blocks(s, found) for s, found in allotment.alone(ask, rank, units).items()), Counter())
        for unit in units:
            if rank in unit.receivers or (rank == unit.reader and unit.from_root):
                own += blocks(unit.shard, [(unit.begin, unit.end)])
        assert own == needed(ask)


@settings(max_examples=50)
@given(asks)
def test_the_root_gives_each_block_once_and_none_that_a_node_holds(said: list[Ask]) -> None:
    units = allotment.allot(said, BODIES)
    held = frozenset[int]().union(*(ask.has for ask in said))
    from_root: Counter[tuple[int, int]] = Counter()
    for rank, ask in enumerate(said):
        for shard, found in allotment.alone(ask, rank, units).items():
            if shard not in ask.has:
                from_root += blocks(shard, found)
    for unit in units:
        assert unit.receivers
        assert unit.reader not in unit.receivers
        assert unit.from_root == (unit.shard not in held)
        if unit.from_root:
            from_root += blocks(unit.shard, [(unit.begin, unit.end)])
        else:
            assert unit.shard in said[unit.reader].has
    assert from_root == Counter({block: 1 for ask in said for block in needed(ask) if block[0] not in held})


@settings(max_examples=50)
@given(asks)
def test_what_goes_over_the_wire_comes_back_as_it_was(said: list[Ask]) -> None:
    assert [Ask.from_json(ask.to_json()) for ask in said] == said


@settings(max_examples=50)
@given(asks, st.lists(st.sampled_from("xyz"), min_size=5, max_size=5))
def test_a_unit_comes_to_each_receiver_once_from_somebody_who_has_it_and_to_each_network_once(
    said: list[Ask], networks: list[str]
) -> None:
    for unit in allotment.allot(said, BODIES):
        first, then = allotment.hops(unit, networks)
        assert sorted(taker for _, taker in first + then) == sorted(unit.receivers)
        assert {giver for giver, _ in first} == {unit.reader}
        assert {giver for giver, _ in then} <= {taker for _, taker in first}
        crossed = [networks[taker] for giver, taker in first + then if networks[giver] != networks[taker]]
        assert sorted(crossed) == sorted({networks[rank] for rank in unit.receivers} - {networks[unit.reader]})


def test_ranks_of_a_network_take_turns_at_passing_on_what_comes_to_it() -> None:
    body, networks = 64 * UNIT_NBYTES, "xyyyy"
    units = allotment.allot([Ask(frozenset([0]), {}), *[Ask(frozenset(), {0: [(0, body)]})] * 4], {0: body})
    passed = Counter(giver for unit in units for giver, _ in allotment.hops(unit, networks).then)
    assert passed == dict.fromkeys([1, 2, 3, 4], 16 * 3)


@settings(max_examples=50)
@given(asks, st.sampled_from([UNIT_NBYTES, 2 * UNIT_NBYTES, ROUND_NBYTES]))
def test_in_no_round_does_a_rank_hold_more_than_its_bound_and_each_keeps_the_order(said: list[Ask], most: int) -> None:
    units = allotment.allot(said, BODIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allotment, "ROUND_NBYTES", most)
        groups = allotment.rounds(units)
    assert all(groups)
    in_order = [unit for group in groups for unit in group]
    assert sorted(in_order) == sorted(units)
    for rank in range(len(said)):
        assert [unit for unit in in_order if rank in ranks_of(unit)] == [
            unit for unit in units if rank in ranks_of(unit)
        ]
        assert all(sum(unit.nbytes for unit in group if rank in ranks_of(unit)) <= most for group in groups)


def test_ranks_that_need_different_shards_all_have_something_to_do_in_every_round() -> None:
    body, pairs = 256 * BLOCK, 64
    asks_of_pairs = [Ask(frozenset(), {rank // 2: [(0, body)]}) for rank in range(2 * pairs)]
    groups = allotment.rounds(allotment.allot(asks_of_pairs, dict.fromkeys(range(pairs), body)))
    assert len(groups) == body // ROUND_NBYTES
    for group in groups:
        assert {rank for unit in group for rank in ranks_of(unit)} == set(range(2 * pairs))


def ranks_of(unit: Unit) -> set[int]:
    return {unit.reader, *unit.receivers}


def test_ranks_that_need_the_same_read_about_as_much_each() -> None:
    body = 300 * BLOCK
    units = allotment.allot([Ask(frozenset(), {0: [(0, body)]})] * 7, {0: body})
    read = Counter[int]()
    for unit in units:
        read[unit.reader] += unit.nbytes
    assert sum(read.values()) == body
    assert max(read.values()) - min(read.values()) <= UNIT_NBYTES
