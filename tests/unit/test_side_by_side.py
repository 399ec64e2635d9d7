"""Small files are read several at a time, what the shards of many ranks say among them."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcpsvc import PerRank
from dcpsvc.conversion import export_dcp
from dcpsvc.errors import CorruptShardError, StoreUnavailableError
from dcpsvc.format.keys import Attempt
from dcpsvc.format.layout import Layout, Tensor
from dcpsvc.format.parse import compact
from dcpsvc.reader import CheckpointReader
from dcpsvc.stages import upload
from dcpsvc.state.values import ValueComponent
from dcpsvc.storage.memory import MemoryStore
from dcpsvc.storage.posix import PosixStore
from dcpsvc.storage.shards import VerifiedShard
from dcpsvc.storage.threads import at_once, each
from dcpsvc.tools import comparing, owning, showing, surgery
from dcpsvc.tools.changes import setting
from dcpsvc.tools.transplant import write_shards
from tests.unit.one_process import save

if TYPE_CHECKING:
    from collections.abc import Generator, ItemsView
    from pathlib import Path

    from dcpsvc.state.saved import Saved
    from dcpsvc.storage.base import Store

RANKS, STEP = 20, 7


class Readings:
    """Counts how many shards are being read; the first waits until there are two."""

    def __init__(self) -> None:
        self.begun = self.most = self._under_way = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def one(self, key: str) -> Generator[None]:
        if not key.startswith("data/"):
            yield
            return
        with self._changed:
            self.begun += 1
            self._under_way += 1
            self.most = max(self.most, self._under_way)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.most > 1, 5)
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= 1


class Watched(PosixStore):
    """A directory whose readings are counted."""

    def __init__(self, root: Path, *, answers: bool = True) -> None:
        super().__init__(root)
        self.readings, self._answers = Readings(), answers

    def read(self, key: str, begin: int, end: int) -> bytes:
        with self.readings.one(key):
            if key.startswith("data/") and not self._answers:
                raise StoreUnavailableError("read", key, "timed out")
            return super().read(key, begin, end)

    @property
    def side_by_side(self) -> bool:
        """Whether several were read at once, and never too many."""
        return 1 < self.readings.most <= at_once(self)


class WatchedMemory(MemoryStore):
    """Likewise, memory, which is asked for as much at once as any store far away."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.readings = Readings()

    def read(self, key: str, begin: int, end: int) -> bytes:
        with self.readings.one(key):
            return super().read(key, begin, end)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A commit of many ranks, each with a value of its own."""
    folder: Path = tmp_path_factory.mktemp("run")
    save(folder, {"model": torch.nn.Linear(2, 3), "note": "hello"}, step=STEP)
    store = PosixStore(folder / "root")
    one = showing.find(store, STEP)
    shard = VerifiedShard([store], one.shards[0])
    own = [{f"own@{rank}": {"epoch": rank}} for rank in range(RANKS)]
    documents = [compact(mine | (shard.documents() if not rank else {})) for rank, mine in enumerate(own)]
    attempt = owning.claim(store).attempt(STEP, 0)
    records, layout = write_shards(
        [shard] * RANKS, documents, showing.layout_of(store, one), store, attempt, progress=lambda _: None
    )
    reference = upload.put_layout(store, layout.dumps())
    surgery.publish(store, replace(one, attempt=attempt.attempt, shards=tuple(records), layout=reference))
    return folder / "root"


def read_in_turn(root: Path) -> list[dict[str, Any]]:
    """What each rank's shard says."""
    store = PosixStore(root)
    return [VerifiedShard([store], record).documents() for record in showing.find(store, STEP).shards]


def side(store: PosixStore) -> comparing.Side:
    found = showing.find(store, STEP)
    return comparing.Side(store, found, showing.layout_of(store, found))


def operation(store: PosixStore) -> surgery.Operation:
    return surgery.Operation(source=store, manifest=showing.find(store, STEP), settings=(setting("own.epoch=50"),))


# --- what the commands read -------------------------------------------------------------------------


def test_an_edit_asks_several_ranks_at_once_and_tells_of_its_changes_in_their_order(root: Path) -> None:
    store = Watched(root)
    plan = operation(store).plan()
    assert store.side_by_side
    assert plan.lines == tuple(f"own@{rank}.epoch: {rank} -> 50" for rank in range(RANKS))
    changed = [said | {f"own@{rank}": {"epoch": 50}} for rank, said in enumerate(read_in_turn(root))]
    assert plan.documents == [compact(said) for said in changed]


def test_a_comparison_asks_several_ranks_of_each_side_at_once(root: Path) -> None:
    mine, theirs = Watched(root), Watched(root)
    assert comparing.compare(side(mine), side(theirs)).same
    assert (mine.side_by_side, theirs.side_by_side) == (True, True)
    found = side(mine).documents()
    assert [found[f"own@{rank}.epoch"] for rank in range(RANKS)] == list(range(RANKS))


def test_an_export_for_dcp_asks_several_ranks_at_once(root: Path, tmp_path: Path) -> None:
    store = Watched(root)
    export_dcp(store, STEP, tmp_path / "out")
    assert store.side_by_side
    state: dict[str, Any] = {f"own@{rank}.epoch": -1 for rank in range(RANKS)} | {"note": ""}
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert state == {f"own@{rank}.epoch": rank for rank in range(RANKS)} | {"note": "hello"}


def test_a_reader_of_dcp_asks_several_ranks_at_once_and_has_what_they_say_in_their_order(root: Path) -> None:
    store = Watched(root)
    found = showing.find(store, STEP)
    reader = CheckpointReader(found, showing.layout_of(store, found), [store])
    expected = {name: value for said in read_in_turn(root) for name, value in said.items()}
    assert list(reader.documents(*range(RANKS)).items()) == list(expected.items())
    assert store.side_by_side


def test_a_store_that_does_not_answer_ends_an_edit_before_all_ranks_were_asked(root: Path) -> None:
    store = Watched(root, answers=False)
    with pytest.raises(StoreUnavailableError, match="timed out"):
        operation(store).plan()
    assert 1 < store.readings.begun <= at_once(store) < RANKS


# --- what a resume reads ------------------------------------------------------------------------------


@pytest.fixture
def far(root: Path) -> WatchedMemory:
    """The same commit in memory, undamaged."""
    here, store = PosixStore(root), WatchedMemory("side-by-side")
    for key, nbytes in here.list(""):
        store.put(key, here.get(key, max_nbytes=nbytes))
    return store


def seen_by(store: Store, rank: int, ranks: int) -> Saved:
    """The commit, as a rank of so many sees it."""
    found = showing.find(store, STEP)
    reader = CheckpointReader(found, showing.layout_of(store, found), [store])
    return replace(reader.saved_for(rank), ranks=ranks, documents_of=reader.documents)


def joined(values: list[Any], rank: int, ranks: int) -> list[Any]:
    return [values, rank, ranks]


def damage(store: MemoryStore, rank: int) -> str:
    """A bit of what a rank says flips; gives the name of its shard."""
    (key,) = (key for key, _ in store.list("data/") if f"rank-{rank:05d}" in key)
    content = bytearray(store.get(key, max_nbytes=1 << 30))
    content[content.index(b'"own@')] ^= 1
    store.put(key, bytes(content))
    return key


def test_values_of_all_saved_ranks_are_read_side_by_side_and_once_and_come_in_their_order(far: WatchedMemory) -> None:
    saved = seen_by(far, 1, 3)
    state: dict[str, Any] = {"own": PerRank(None, resize=joined)}
    component = ValueComponent("own", state)
    far.readings = Readings()
    assert component.wants(saved) == []
    assert 1 < far.readings.most <= at_once(far) < RANKS - 2 == far.readings.begun
    component.apply(saved, {})
    assert state["own"].value == [[{"epoch": rank} for rank in range(RANKS)], 1, 3]
    assert far.readings.begun == RANKS - 2


def test_own_values_are_asked_for_some_at_a_time_until_one_will_do(far: WatchedMemory) -> None:
    found = seen_by(far, 2 + RANKS, RANKS + 3).own_documents("own")
    far.readings = Readings()
    assert next(found) == {"epoch": 2}
    assert far.readings.begun == 0
    assert next(found) == {"epoch": 0}
    assert 1 < far.readings.most <= far.readings.begun < at_once(far)
    assert [document["epoch"] for document in found] == [rank for rank in range(1, RANKS) if rank != 2]


def test_the_first_of_two_damaged_ranks_is_named_each_time_and_the_value_stays_as_it_was(far: WatchedMemory) -> None:
    damaged = [damage(far, rank) for rank in (3, 2)]
    state: dict[str, Any] = {"own": PerRank(None, resize=joined)}
    for _ in range(5):
        saved, far.readings = seen_by(far, 1, 3), Readings()
        with pytest.raises(CorruptShardError, match="do not match their checksum") as caught:
            ValueComponent("own", state).wants(saved)
        assert caught.value.path == damaged[1]
    assert state["own"].value is None


# --- what is written anew -------------------------------------------------------------------------------


class Counted(dict[str, Tensor]):
    """Tensors of a layout, and how often somebody went through all of them."""

    passes = 0

    def items(self) -> ItemsView[str, Tensor]:
        self.passes += 1
        return super().items()


@pytest.mark.parametrize("ranks", [1, RANKS])
def test_shards_written_anew_look_at_each_tensor_twice_however_many_ranks_there_are(root: Path, ranks: int) -> None:
    here = PosixStore(root)
    found = showing.find(here, STEP)
    layout = showing.layout_of(here, found)
    tensors, shards = Counted(layout.tensors), [VerifiedShard([here], record) for record in found.shards[:ranks]]
    records, written = write_shards(
        shards, [b"{}"] * ranks, Layout(tensors), MemoryStore("written-anew"), Attempt(STEP, "cafe-0"),
        progress=lambda _: None,
    )  # fmt: skip
    assert (len(records), sorted(written.tensors)) == (ranks, sorted(layout.tensors))
    assert tensors.passes == 2


# --- several calls ------------------------------------------------------------------------------------


def test_results_come_in_order_whichever_is_ready_first() -> None:
    second = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second.wait(10)
        second.set()
        return item * item

    assert each(work, range(20), 2) == [item * item for item in range(20)]


def test_nothing_begins_after_an_error() -> None:
    begun: list[int] = []
    together = threading.Barrier(2)

    def work(item: int) -> None:
        begun.append(item)
        together.wait(10)
        raise ValueError(item)

    with pytest.raises(ValueError, match=r"^0$"):
        each(work, range(1000), 2)
    assert sorted(begun) == [0, 1]


def test_an_error_counts_while_an_earlier_call_is_still_under_way() -> None:
    failing: list[threading.Thread] = []
    failed = threading.Event()

    def work(item: int) -> None:
        if item == 1:
            failing.append(threading.current_thread())
            failed.set()
            raise ValueError(item)
        assert failed.wait(10)
        failing[0].join(10)  # it ends when nobody will need it any more
        assert not failing[0].is_alive()

    with pytest.raises(ValueError, match=r"^1$"):
        each(work, range(2), 2)


def test_of_several_errors_the_first_in_order_is_raised_though_a_later_one_came_before_it() -> None:
    failed = threading.Event()

    def work(item: int) -> None:
        if item == 1:
            failed.set()
        assert failed.wait(10)
        raise ValueError(item)

    for _ in range(20):
        with pytest.raises(ValueError, match=r"^0$"):
            each(work, range(2), 2)
        failed.clear()
