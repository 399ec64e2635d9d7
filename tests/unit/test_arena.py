"""Arenas: the memory a shard is copied into is there before it is needed, is used again, and is bounded."""

from __future__ import annotations

import mmap
import os
import resource
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from dcpsvc.arena import Arena
from dcpsvc.arenas import Arenas, Tight
from dcpsvc.format import shardfile
from dcpsvc.format.shardfile import Piece, Placement

DEVICE = torch.device("cuda", 0)
MIB = 2**20
SECONDS = 20
"""Longer than anything here can take."""


def placed(**numels: int) -> Placement:
    return shardfile.place(Piece(key, "F32", (numel,), (0,), (numel,)) for key, numel in numels.items())


# --- one arena --------------------------------------------------------------------------------------


def faults() -> int:
    """Pages the kernel had to give to this thread so far."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


@pytest.fixture
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.usefixtures("one_thread")
def test_the_first_copy_into_an_arena_finds_its_memory_there() -> None:
    source, arena = torch.ones(64 * MIB, dtype=torch.uint8), Arena()
    memory = arena.reserve(64 * MIB)
    before = faults()
    memory.copy_(source)
    assert faults() - before < 10  # of 16,384, or of 32 huge ones


@pytest.mark.usefixtures("one_thread")
def test_a_forked_child_costs_the_next_copy_nothing() -> None:
    """Else each page would have to be separated from the child's: a data loader worker that stays for the epoch."""
    source, arena = torch.ones(64 * MIB, dtype=torch.uint8), Arena()
    memory = arena.reserve(64 * MIB).fill_(7)
    (seen, says), (waits, go) = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        os.write(says, bytes([int(memory[-1])]))
        memory[0] = 3
        os.read(waits, 1)
        os._exit(0)
    child_saw, before = os.read(seen, 1), faults()
    memory.copy_(source)
    taken = faults() - before
    os.write(go, b"x")
    os.waitpid(child, 0)
    for descriptor in (seen, says, waits, go):
        os.close(descriptor)
    assert child_saw == b"\0"
    assert taken < 200  # of 16,384; the interpreter's own are among them
    assert bool((memory == 1).all())


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, MIB, 2 * MIB, 5 * MIB + 1])
def test_an_arena_begins_on_a_page_and_is_as_large_as_asked(nbytes: int) -> None:
    arena = Arena()
    memory = arena.reserve(nbytes)
    assert memory.data_ptr() % mmap.PAGESIZE == 0
    assert memory.numel() == nbytes
    assert nbytes <= arena.nbytes < nbytes + mmap.PAGESIZE
    memory.fill_(1)


def test_a_shard_that_grows_a_little_stays_where_it_is() -> None:
    arena = Arena()
    first = arena.reserve(64 * MIB)
    assert arena.reserve(65 * MIB).data_ptr() == first.data_ptr()
    assert arena.nbytes == 65 * MIB


def test_touching_ends_when_nobody_wants_it_and_the_memory_is_there_all_the_same() -> None:
    arena = Arena()
    memory = arena.reserve(MIB, lambda: False)
    assert arena.nbytes == 0
    assert int(memory.fill_(1).sum()) == MIB


def test_the_pieces_are_cut_once_for_a_placement_and_anew_when_the_arena_moves() -> None:
    arena, placement, other = Arena(), placed(a=5, b=7), placed(a=5, b=8)
    pieces = arena.cut(placement)
    assert [piece.numel() for piece in pieces] == [5, 7]
    assert [piece.data_ptr() - arena.reserve(1).data_ptr() for piece in pieces] == list(placement.begins)
    assert arena.cut(placement) is pieces
    assert [piece.numel() for piece in arena.cut(other)] == [5, 8]
    pieces = arena.cut(placement)
    moved = arena.reserve(64 * MIB)
    assert arena.cut(placement) is not pieces
    arena.cut(placement)[0].fill_(1)
    assert moved[placement.begins[0] :].view(torch.float32)[0] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_pinning_does_no_harm_where_there_is_no_accelerator() -> None:
    arena = Arena()
    assert arena.pin(DEVICE)  # there is nothing to pin
    arena.reserve(MIB)
    assert not arena.pin(DEVICE)
    arena.release()
    assert arena.nbytes == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_memory_that_cannot_be_pinned_is_used_as_it_is_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    arenas = Arenas(None, 2, lambda: None)
    arenas.device = DEVICE
    for nbytes in (MIB, 3 * MIB):
        assert isinstance(arenas.take(nbytes), Arena)
    assert [record.message for record in caplog.records if "pinned" in record.message] == [
        "memory for staging cannot be pinned for cuda:0: copies from it are slower, and save() waits for them"
    ]


class Pinned(Arena):
    """Notes how much of it was pinned, and is never refused."""

    seen: ClassVar[list[int]] = []

    def pin(self, device: torch.device) -> bool:
        assert device == DEVICE
        self.seen.append(self.nbytes)
        return True


def test_an_arena_is_pinned_when_it_is_made_and_again_when_it_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcpsvc.arenas.Arena", Pinned)
    arenas = Arenas(None, 2, lambda: None)
    arenas.device = DEVICE
    arenas.make_ready(placed(a=4 * MIB))
    made = arenas.nbytes
    assert Pinned.seen == [made]
    arenas.take(made + MIB)
    assert Pinned.seen == [made, arenas.nbytes]
    assert arenas.nbytes > made


# --- all of them ------------------------------------------------------------------------------------


class Disk:
    """Reads an arena until it is told to end."""

    ended = False


def lent(arenas: Arenas, nbytes: int) -> tuple[Arena, Disk]:
    arena, disk = arenas.take(nbytes), Disk()
    assert isinstance(arena, Arena)
    arena.reader = disk
    return arena, disk


def test_an_arena_is_used_again_once_it_is_written() -> None:
    arenas = Arenas(None, 3, lambda: None)
    first, disk = lent(arenas, 3 * MIB)
    second, _ = lent(arenas, MIB)
    assert second is not first
    disk.ended = True
    assert arenas.take(2 * MIB) is first


def test_the_smallest_arena_that_fits_is_taken() -> None:
    arenas = Arenas(None, 3, lambda: None)
    (large, one), (small, other) = lent(arenas, 3 * MIB), lent(arenas, MIB)
    one.ended = other.ended = True
    assert arenas.take(MIB) is small
    assert arenas.take(2 * MIB) is large


def test_what_does_not_fit_the_budget_gets_no_arena_and_free_ones_are_given_back() -> None:
    arenas = Arenas(3 * MIB, 3, lambda: None)
    _, disk = lent(arenas, 2 * MIB)
    assert arenas.take(2 * MIB) == Tight(MIB)
    disk.ended = True
    assert arenas.take(4 * MIB) == Tight(3 * MIB)
    assert arenas.nbytes == 0
    assert isinstance(arenas.take(3 * MIB), Arena)


def test_without_a_budget_what_is_free_when_an_arena_is_made_counts() -> None:
    free_nbytes = MIB
    arenas = Arenas(None, 3, lambda: free_nbytes)
    assert arenas.take(2 * MIB) == Tight(MIB)
    free_nbytes = 2 * MIB
    arena = arenas.take(2 * MIB)
    free_nbytes = 0
    assert arenas.take(2 * MIB) is arena


def test_memory_that_the_system_does_not_give_is_done_without() -> None:
    with pytest.raises(MemoryError):
        Arena().reserve(1 << 60)
    arenas = Arenas(None, 3, lambda: None)
    assert arenas.take(1 << 60) == Tight(0)
    assert isinstance(arenas.take(MIB), Arena)


def test_a_disk_that_hangs_on_shard_after_shard_does_not_take_all_memory() -> None:
    arenas = Arenas(None, 2, lambda: None)
    lent(arenas, MIB)
    _, second = lent(arenas, MIB)
    with pytest.raises(TimeoutError, match="the local disk has not taken the 2 shards before this one"):
        arenas.take(MIB)
    second.ended = True
    assert isinstance(arenas.take(MIB), Arena)


def resident_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_an_arena_that_is_released_takes_no_memory_even_while_somebody_refers_to_it() -> None:
    arena = Arena()
    held = arena.reserve(128 * MIB).fill_(1)
    full = resident_nbytes()
    arena.release()
    assert full - resident_nbytes() > 120 * MIB
    assert int(held[0]) == 0
    assert arena.nbytes == 0


# --- made in the background -------------------------------------------------------------------------


def test_a_prepared_arena_is_the_one_that_is_taken_and_taking_waits_for_it() -> None:
    arenas, placement, begun, go = Arenas(None, 2, lambda: None), placed(a=MIB), threading.Event(), threading.Event()
    made: list[Arena] = []

    def work() -> None:
        begun.set()
        go.wait(SECONDS)
        arenas.make_ready(placement)
        made.extend(arenas._arenas)

    arenas.prepare(work)
    assert begun.wait(SECONDS)
    assert arenas.nbytes == 0
    threading.Timer(0.05, go.set).start()
    arena = arenas.take(placement.tensors_end)
    assert made == [arena]
    assert isinstance(arena, Arena)
    assert arenas.nbytes == arena.nbytes >= placement.tensors_end
    assert arena.cut(placement)[0].numel() == MIB


def test_preparing_twice_ends_with_what_was_asked_for_last() -> None:
    arenas = Arenas(None, 2, lambda: None)
    for numel in (MIB, 3 * MIB):
        arenas.prepare(lambda numel=numel: arenas.make_ready(placed(a=numel)))
    arenas.settle()
    assert 12 * MIB <= arenas.nbytes < 13 * MIB


def test_what_was_prepared_and_is_a_little_too_small_grows() -> None:
    arenas = Arenas(None, 2, lambda: None)
    arenas.make_ready(placed(a=16 * MIB))
    before = arenas.nbytes
    arena = arenas.take(before + MIB)
    assert isinstance(arena, Arena)
    assert arena.nbytes == before + MIB
    assert arenas.nbytes == arena.nbytes


def test_what_has_grown_stays_within_the_budget() -> None:
    arenas = Arenas(65 * MIB, 2, lambda: None)
    assert isinstance(arenas.take(64 * MIB), Arena)
    assert arenas.take(66 * MIB) == Tight(65 * MIB)


def test_nothing_is_prepared_beyond_the_budget() -> None:
    arenas = Arenas(MIB, 2, lambda: None)
    arenas.make_ready(placed(a=MIB))
    assert arenas.nbytes == 0


def test_closing_calls_off_what_is_being_prepared() -> None:
    arenas, begun = Arenas(None, 2, lambda: None), threading.Event()

    def work() -> None:
        begun.set()
        while arenas._wanted():
            pass
        arenas.make_ready(placed(a=MIB))

    arenas.prepare(work)
    assert begun.wait(SECONDS)
    arenas.close()
    assert arenas.nbytes == 0
    assert "dcpsvc-prepare" not in [thread.name for thread in threading.enumerate()]


def test_what_hangs_keeps_nothing_waiting_for_ever_and_no_memory_is_taken_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dcpsvc.arenas._PATIENCE_S", 0.05)
    arenas, go, done = Arenas(None, 2, lambda: None), threading.Event(), []
    arenas.prepare(lambda: done.append(go.wait(SECONDS)))
    for _ in range(2):
        arenas.prepare(lambda: done.append(False))
    hangs, *waiting = arenas._preparing
    for thread in waiting:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in waiting)
    with pytest.raises(TimeoutError, match="memory for staging is not there"):
        arenas.take(MIB)
    assert done == []
    go.set()
    hangs.join(SECONDS)
    assert isinstance(arenas.take(MIB), Arena)
    assert done == [True]
