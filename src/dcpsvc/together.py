"""Reading together: ranks that need the same bytes get them from each other, so the run root gives each once.

It never decides whether a resume works: where it breaks, on any rank, every rank reads by itself.
"""

from __future__ import annotations

import functools
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from dcpsvc import allotment, whereabouts
from dcpsvc.allotment import Ask
from dcpsvc.format.parse import compact
from dcpsvc.preflight import mebibytes
from dcpsvc.progress import unseen
from dcpsvc.ranks.exchange import Parcel
from dcpsvc.storage.fetch import AT_ONCE, fetch
from dcpsvc.storage.scatter import deliver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from concurrent.futures import Executor, Future

    from dcpsvc.allotment import Unit
    from dcpsvc.progress import Watch
    from dcpsvc.ranks.exchange import Exchange
    from dcpsvc.storage.scatter import Needs
    from dcpsvc.storage.shards import VerifiedShard


class Sources(NamedTuple):
    """Where the bytes of a checkpoint came from.

    Attributes:
        local_nbytes: The disk of the rank's own node.
        peer_nbytes: Other ranks.
        root_nbytes: The run root.
    """

    local_nbytes: int = 0
    peer_nbytes: int = 0
    root_nbytes: int = 0

    def __str__(self) -> str:
        named = zip(self, ("local disks", "other ranks", "the run root"), strict=True)
        return ", ".join(f"{mebibytes(nbytes)} from {place}" for nbytes, place in named if nbytes) or "nothing"


class NotTogetherError(Exception):
    """A rank could not do its part; every rank that hears of it raises this."""


def read(
    exchange: Exchange,
    rank: int,
    shards: Mapping[int, VerifiedShard],
    needs: Mapping[int, Needs],
    watch: Watch = unseen,
) -> int:
    """Read a checkpoint with all other ranks, over a group that is made and left here; see :class:`Together`.

    Returns:
        Bytes that came from other ranks.
    """
    try:
        exchange.renew(0)
        reading = Together(rank, exchange, shards, needs, watch)
        reading.run()
    finally:
        exchange.close()
    return reading.received_nbytes


class Together:
    """One checkpoint, read by all ranks together. Every rank runs it at the same time, on one thread each.

    Args:
        rank: This one.
        exchange: A connected group of all ranks.
        shards: Of the checkpoint, by the rank that wrote them.
        needs: What this rank needs of them. Nobody looks at where it goes before all of it is there.
        watch: How far it is.

    Attributes:
        received_nbytes: From other ranks.
    """

    def __init__(
        self,
        rank: int,
        exchange: Exchange,
        shards: Mapping[int, VerifiedShard],
        needs: Mapping[int, Needs],
        watch: Watch = unseen,
    ) -> None:
        self._rank, self._exchange = rank, exchange
        self._shards, self._needs, self._watch = shards, needs, watch
        self._failure = ""
        self._networks: list[str] = []
        self._done: Callable[[int], None] = lambda _: None
        self.received_nbytes = 0

    def run(self) -> None:
        """Fill everything this rank needs with proven bytes. After an error it holds anything.

        Raises:
            NotTogetherError: Some rank could not read, or got other bytes than were written.
            LostPeerError: A peer does not answer.
            CorruptShardError: What nobody else needs is damaged.
            StoreError: Likewise, cannot be read.
        """
        ask = Ask(
            frozenset(rank for rank, shard in self._shards.items() if shard.near),
            {rank: needed.runs() for rank, needed in self._needs.items()},
            whereabouts.network(),
        )
        asks = [Ask.from_json(said) for said in self._tell_all(ask.to_json())]
        self._networks = [each.network for each in asks]
        units = allotment.allot(asks, {rank: shard.record.body_nbytes for rank, shard in self._shards.items()})
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="dcpsvc-together") as pool:
            try:
                self._pass_on_tables(units)
                with self._watch(self._expected_nbytes(units)) as self._done:
                    self._go_round(units, pool)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        fetch(self._shards, self._needs, direct=True, within=allotment.alone(ask, self._rank, units), watch=self._watch)

    def _expected_nbytes(self, units: Iterable[Unit]) -> int:
        mine = (
            unit for unit in units if self._rank in unit.receivers or (unit.reader == self._rank and unit.from_root)
        )
        return sum(unit.nbytes for unit in mine)

    def _pass_on_tables(self, units: Iterable[Unit]) -> None:
        """Each block table is read by one rank: the first that reads something of its shard for others."""
        readers: dict[int, int] = {}
        for unit in units:
            readers.setdefault(unit.shard, unit.reader)
        mine = [shard for shard, reader in readers.items() if reader == self._rank]
        told = b"".join(self._tried(self._shards[shard].table) or b"" for shard in mine)
        said = dict(enumerate(self._hear_all(told)))
        for shard, reader in readers.items():
            record = self._shards[shard].record
            nbytes = record.nbytes - record.body_nbytes
            table, said[reader] = said[reader][:nbytes], said[reader][nbytes:]
            self._shards[shard].adopt(table)

    def _go_round(self, units: Iterable[Unit], pool: Executor) -> None:
        """Pass everything on. While one round is under way the next is read."""
        groups = allotment.rounds(units)
        ahead = self._begin(groups[0], pool) if groups else {}
        arrived: list[Callable[[], None]] = []
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="dcpsvc-deliver") as unpacking:
            for number, group in enumerate(groups):
                unpacked = [unpacking.submit(each) for each in arrived]
                reading = ahead
                ahead = self._begin(groups[number + 1], pool) if number + 1 < len(groups) else {}
                read = {tag: data for tag, task in reading.items() if (data := self._tried(task.result)) is not None}
                for task in unpacked:
                    self._tried(task.result)
                self._hear_all(b"")
                arrived = self._pass_on(group, read)
            for task in [unpacking.submit(each) for each in arrived]:
                self._tried(task.result)
        self._hear_all(b"")

    def _begin(self, group: Iterable[Unit], pool: Executor) -> dict[int, Future[memoryview]]:
        mine = ((tag, unit) for tag, unit in enumerate(group) if unit.reader == self._rank)
        return {tag: pool.submit(self._read, unit) for tag, unit in mine}

    def _read(self, unit: Unit) -> memoryview:
        data = memoryview(bytearray(unit.nbytes))
        self._shards[unit.shard].read_into(unit.begin, [data])
        return data

    def _pass_on(self, group: Iterable[Unit], read: Mapping[int, memoryview]) -> list[Callable[[], None]]:
        """Give and take; what is to be done then with what there is of this rank's own needs, on any thread."""
        memory = dict(read)
        mine: list[Callable[[], None]] = []
        for tag, unit in enumerate(group):
            if unit.reader == self._rank and unit.from_root:
                mine.append(functools.partial(self._deliver, unit, memory[tag]))
            elif self._rank in unit.receivers:
                memory[tag] = memoryview(bytearray(unit.nbytes))
                mine.append(functools.partial(self._unpack, unit, memory[tag]))
                self.received_nbytes += unit.nbytes
        ways = [allotment.hops(unit, self._networks) for unit in group]
        for hop in ([way.first for way in ways], [way.then for way in ways]):
            pairs = [(tag, giver, taker) for tag, found in enumerate(hop) for giver, taker in found]
            outgoing = [Parcel(taker, tag, memory[tag]) for tag, giver, taker in pairs if giver == self._rank]
            incoming = [Parcel(giver, tag, memory[tag]) for tag, giver, taker in pairs if taker == self._rank]
            self._exchange.swap(outgoing, incoming)
        return mine

    def _unpack(self, unit: Unit, data: memoryview) -> None:
        self._shards[unit.shard].check(unit.begin, data)
        self._deliver(unit, data)

    def _deliver(self, unit: Unit, data: memoryview) -> None:
        if self._failure:
            return  # nothing of it will be used
        deliver(self._needs[unit.shard].parts(unit.begin, unit.end), unit.begin, data)
        self._done(unit.nbytes)

    def _tried(self, work: Callable[[], Any]) -> Any:
        """A failure is told to the others before anybody waits for this rank again."""
        try:
            return work()
        except Exception as err:  # noqa: BLE001 - whatever it is, the others must hear of it
            self._failure = self._failure or f"{type(err).__name__}: {err}"
            return None

    def _tell_all(self, said: Any) -> list[Any]:
        return [json.loads(zlib.decompress(data)) for data in self._hear_all(zlib.compress(compact(said), 1))]

    def _hear_all(self, data: bytes) -> list[bytes]:
        """What all ranks say.

        Raises:
            NotTogetherError: One of them says that it failed.
        """
        answers = self._exchange.all_gather(b"!" + self._failure.encode() if self._failure else b"." + data)
        for rank, answer in enumerate(answers):
            if answer.startswith(b"!"):
                raise NotTogetherError(f"rank {rank}: {answer[1:].decode(errors='replace')}")
        return [answer[1:] for answer in answers]
