"""Who reads what for whom, when several ranks need the same bytes: a pure function, the same on every rank.

A rank whose node holds a shard on its own disk reads what it needs there. Everybody else gets each byte once: from a
rank that holds the shard, if there is one; else one of those who need it reads it from the run root, and passes it on.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

UNIT_NBYTES = 4 << 20
"""Small enough that all ranks have some to read in each round."""

ROUND_NBYTES = 64 << 20
"""The most that one rank reads and is given in one round."""

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Ask:
    """What one rank brings.

    Attributes:
        has: Shards that its node holds, by the rank that wrote them.
        needs: Of each shard, ranges of whole blocks, ascending.
        network: Ranks with the same one reach each other without a cable.
    """

    has: frozenset[int]
    needs: Mapping[int, Sequence[Range]]
    network: str = ""

    def to_json(self) -> Any:
        """For the others."""
        return [sorted(self.has), [[shard, list(runs)] for shard, runs in sorted(self.needs.items())], self.network]

    @classmethod
    def from_json(cls, said: Any) -> Ask:
        """What :meth:`to_json` gave."""
        has, needs, network = said
        return cls(frozenset(has), {shard: [(begin, end) for begin, end in runs] for shard, runs in needs}, network)


class Unit(NamedTuple):
    """Some blocks of a shard that one rank reads for others.

    Attributes:
        shard: By the rank that wrote it.
        begin: First byte.
        end: The first byte after it.
        reader: Who reads it.
        receivers: Who gets it.
        from_root: The reader has it from the run root.
    """

    shard: int
    begin: int
    end: int
    reader: int
    receivers: tuple[int, ...]
    from_root: bool

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.end - self.begin


def allot(asks: Sequence[Ask], body_nbytes: Mapping[int, int]) -> list[Unit]:
    """What is passed on, in the order of the files. Readers of one range take turns, so each reads as much.

    Args:
        asks: Of all ranks, in their order.
        body_nbytes: Of each shard.
    """
    units: list[Unit] = []
    turns: dict[tuple[int, ...], Iterator[int]] = {}
    for shard in sorted({shard for ask in asks for shard in ask.needs}):
        holders = tuple(rank for rank, ask in enumerate(asks) if shard in ask.has)
        lacking = {
            rank: ask.needs[shard] for rank, ask in enumerate(asks) if shard in ask.needs and rank not in holders
        }
        for begin, end, ranks in _together(lacking):
            if not holders and len(ranks) == 1:
                continue  # nobody else needs it
            readers = holders or ranks
            turn = turns.setdefault(readers, itertools.cycle(readers))
            for at in range(begin, min(end, body_nbytes[shard]), UNIT_NBYTES):
                reader = next(turn)
                receivers = tuple(rank for rank in ranks if rank != reader)
                until = min(at + UNIT_NBYTES, end, body_nbytes[shard])
                units.append(Unit(shard, at, until, reader, receivers, not holders))
    return units


class Hops(NamedTuple):
    """Who gives a unit to whom, as pairs of ranks.

    Attributes:
        first: The reader, to all around it and to one rank of every other network.
        then: Those, to all around them.
    """

    first: list[tuple[int, int]]
    then: list[tuple[int, int]]


def hops(unit: Unit, networks: Sequence[str]) -> Hops:
    """The way of a unit: it comes to each network once. Ranks of one take turns at receiving it.

    Args:
        unit: Which.
        networks: Of all ranks, in their order.
    """
    around: dict[str, list[int]] = defaultdict(list)
    for rank in unit.receivers:
        around[networks[rank]].append(rank)
    found = Hops([(unit.reader, rank) for rank in around.pop(networks[unit.reader], [])], [])
    for ranks in around.values():
        head = ranks[unit.begin // UNIT_NBYTES % len(ranks)]
        found.first.append((unit.reader, head))
        found.then.extend((head, rank) for rank in ranks if rank != head)
    return found


def rounds(units: Iterable[Unit]) -> list[list[Unit]]:
    """The units in groups that go one after the other, each unit in the first that has room on all of its ranks.

    So ranks that need different shards have something to do in every round, whatever the order of the files; and a rank
    passes on its units in that order.
    """
    groups: list[list[Unit]] = []
    places: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))  # of each rank: its last round, and bytes in it
    for unit in units:
        ranks = (unit.reader, *unit.receivers)
        number = max(places[rank][0] for rank in ranks)
        held = {rank: places[rank][1] if places[rank][0] == number else 0 for rank in ranks}
        if max(held.values()) and max(held.values()) + unit.nbytes > ROUND_NBYTES:
            number, held = number + 1, dict.fromkeys(ranks, 0)
        places.update((rank, (number, nbytes + unit.nbytes)) for rank, nbytes in held.items())
        groups += [[] for _ in range(number + 1 - len(groups))]
        groups[number].append(unit)
    return groups


def alone(ask: Ask, rank: int, units: Iterable[Unit]) -> dict[int, list[Range]]:
    """What of its needs a rank reads without the others: all but what it passes on or is given."""
    shared: dict[int, list[Range]] = defaultdict(list)
    for unit in units:
        if rank in unit.receivers or (unit.reader == rank and unit.shard not in ask.has):
            shared[unit.shard].append((unit.begin, unit.end))
    left = {shard: list(_without(runs, shared[shard])) for shard, runs in ask.needs.items()}
    return {shard: runs for shard, runs in left.items() if runs}


def _together(needs: Mapping[int, Sequence[Range]]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Ranges that the same ranks need, ascending."""
    events: dict[int, list[tuple[int, bool]]] = defaultdict(list)
    for rank, runs in needs.items():
        for begin, end in runs:
            events[begin].append((rank, True))
            events[end].append((rank, False))
    who: set[int] = set()
    places = sorted(events)
    for at, until in itertools.pairwise(places):
        for rank, begins in events[at]:
            (who.add if begins else who.discard)(rank)
        if who:
            yield at, until, tuple(sorted(who))


def _without(runs: Iterable[Range], taken: Sequence[Range]) -> Iterator[Range]:
    """Ascending ranges, less others that ascend."""
    rest = iter(taken)
    hole = next(rest, None)
    for low, high in runs:
        at = low
        while hole is not None and hole[0] < high:
            if hole[1] > at:
                if hole[0] > at:
                    yield at, hole[0]
                at = hole[1]
            if hole[1] > high:
                break
            hole = next(rest, None)
        if at < high:
            yield at, high
