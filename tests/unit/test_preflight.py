"""What the machine has and what a save needs, in numbers: control groups as the kernel writes them, shared disks."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc import preflight
from dcpsvc.errors import StoreAccessError, StoreError
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.format.keys import Attempt
from dcpsvc.format.shardfile import Piece
from dcpsvc.preflight import DiskNeed, Size
from dcpsvc.storage.posix import PosixStore

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 2**20
GIB = 2**30
UNLIMITED = 9223372036854771712
"""As version 1 writes it."""


class Machine:
    """A kernel's files, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.meminfo, self.membership, self.cgroups = folder / "meminfo", folder / "self-cgroup", folder / "cgroup"
        self.meminfo.write_text(
            "MemTotal:       16777216 kB\nMemFree:        1048576 kB\nMemAvailable:    8388608 kB\n"
        )
        self.membership.write_text("0::/\n")

    def v1(self, group: str, limit: int, usage: int, cache: int = 0) -> None:
        folder = self.cgroups / "memory" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"cache 5\ninactive_file 3\ntotal_inactive_file {cache}\n")

    def v2(self, group: str, limit: int | str, usage: int, cache: int = 0, *, mount: str = ".") -> None:
        folder = self.cgroups / mount / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cache}\nactive_file 9\n")

    @property
    def free_nbytes(self) -> int | None:
        return preflight.free_memory_nbytes(meminfo=self.meminfo, membership=self.membership, cgroups=self.cgroups)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# --- memory ---------------------------------------------------------------------------------------


def test_without_a_limit_the_available_memory_counts(machine: Machine) -> None:
    machine.v2("", "max", 3 * GIB)
    assert machine.free_nbytes == 8 * GIB


def test_a_limit_above_what_the_machine_has_changes_nothing(machine: Machine) -> None:
    machine.v2("", 100 * GIB, 3 * GIB)
    assert machine.free_nbytes == 8 * GIB


def test_what_is_left_of_the_limit_of_a_control_group_counts_without_unused_page_cache(machine: Machine) -> None:
    machine.membership.write_text("0::/job.slice/step-3\n")
    machine.v2("job.slice/step-3", 4 * GIB, 3 * GIB, cache=2 * GIB)
    assert machine.free_nbytes == 3 * GIB


def test_the_smallest_limit_on_the_way_up_counts(machine: Machine) -> None:
    machine.membership.write_text("0::/job.slice/step-3\n")
    machine.v2("job.slice/step-3", "max", GIB)
    machine.v2("job.slice", 2 * GIB, GIB + 1)
    assert machine.free_nbytes == GIB - 1


def test_version_1_counts_and_its_way_to_say_unlimited(machine: Machine) -> None:
    machine.membership.write_text("12:cpu,cpuacct:/elsewhere\n4:memory:/docker/abc\n0::/\n")
    machine.v1("", UNLIMITED, 7 * GIB)
    assert machine.free_nbytes == 8 * GIB
    machine.v1("docker/abc", 2 * GIB, GIB, cache=100)
    assert machine.free_nbytes == GIB + 100


def test_version_2_beside_version_1_counts(machine: Machine) -> None:
    machine.membership.write_text("4:memory:/\n0::/a\n")
    machine.v1("", UNLIMITED, 7 * GIB)
    machine.v2("a", GIB, 1, mount="unified")
    assert machine.free_nbytes == GIB - 1


def test_in_a_container_that_sees_the_path_of_its_host_the_mounted_group_counts(machine: Machine) -> None:
    machine.membership.write_text("4:memory:/kubepods/pod1/abc\n")
    machine.v1("", GIB, 1)
    assert machine.free_nbytes == GIB - 1


def test_a_group_that_uses_more_than_its_limit_has_nothing_left(machine: Machine) -> None:
    machine.v2("", GIB, GIB + 5)
    assert machine.free_nbytes == 0


@pytest.mark.parametrize("text", ["", "nonsense", "MemAvailable:\n", "MemAvailable: much kB\n"])
def test_a_machine_that_does_not_say_sets_no_bound(machine: Machine, text: str) -> None:
    machine.meminfo.write_text(text)
    assert machine.free_nbytes is None


def test_files_that_are_not_there_set_no_bound(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert preflight.free_memory_nbytes(meminfo=nowhere, membership=nowhere, cgroups=nowhere) is None


def test_this_machine_says_something_sensible() -> None:
    pages, page_nbytes = os.sysconf("SC_PHYS_PAGES"), resource.getpagesize()
    free = preflight.free_memory_nbytes()
    assert free is not None
    assert 0 < free <= pages * page_nbytes


def test_ranks_of_one_machine_share_its_memory() -> None:
    alone, shared = preflight.memory_share_nbytes(1), preflight.memory_share_nbytes(1000)
    assert alone is not None
    assert shared is not None
    assert 0 < shared < alone / 500


@pytest.mark.parametrize(("said", "ranks"), [("8", 8), (None, 1), ("", 1), ("0", 1), ("-3", 1), ("many", 1)])
def test_the_launcher_says_how_many_ranks_share_a_machine(said: str | None, ranks: int) -> None:
    assert preflight.ranks_here({} if said is None else {"LOCAL_WORLD_SIZE": said}) == ranks


@given(st.integers(0, 64 * MIB))
def test_a_window_is_whole_blocks_within_the_budget_but_one_block_at_least(spare_nbytes: int) -> None:
    window = preflight.window_nbytes(spare_nbytes)
    assert window % BLOCK_NBYTES == 0
    assert window >= BLOCK_NBYTES
    assert window <= max(spare_nbytes, BLOCK_NBYTES)
    assert window > min(spare_nbytes, 15 * MIB) - BLOCK_NBYTES


# --- disk -----------------------------------------------------------------------------------------


def need(rank: int, disk: str, need_mib: int, free_mib: int | None, folder_mib: int = 0) -> DiskNeed:
    free = None if free_mib is None else free_mib * MIB
    return DiskNeed(
        rank=rank, disk=disk, path=f"/nvme/{disk}", need_nbytes=need_mib * MIB, free_nbytes=free,
        folder_nbytes=folder_mib * MIB,
    )  # fmt: skip


def test_ranks_that_share_a_disk_need_room_for_all_of_them() -> None:
    needs = [need(2, "b", 6, 9), need(0, "a", 5, 9), need(1, "a", 5, 9), need(3, "b", 3, 9)]

    (short,) = preflight.shortage(needs)

    assert (short.path, short.ranks, short.need_nbytes, short.free_nbytes) == ("/nvme/a", (0, 1), 10 * MIB, 9 * MIB)
    assert short.missing_nbytes == MIB
    assert str(short) == "/nvme/a has 9.0 MiB free and ranks (0, 1) need 10.0 MiB: 1.0 MiB short"


def test_every_short_disk_is_named() -> None:
    needs = [need(0, "b", 5, 4), need(1, "a", 5, 1), need(2, "c", 5, 5)]
    assert [(short.path, short.ranks) for short in preflight.shortage(needs)] == [("/nvme/b", (0,)), ("/nvme/a", (1,))]


def test_what_a_folder_repeats_of_all_shards_is_needed_on_the_disk_of_rank_0_and_said() -> None:
    needs = [need(2, "b", 6, 6, 2), need(0, "a", 5, 9, 1), need(1, "a", 0, 9, 2)]

    (short,) = preflight.shortage(needs)

    said = (
        "/nvme/a has 9.0 MiB free and ranks (0, 1) need 10.0 MiB, 5.0 MiB of it for the adapter folder: 1.0 MiB short"
    )
    assert str(short) == said


def test_the_smallest_room_anybody_saw_counts() -> None:
    assert preflight.shortage([need(0, "a", 2, 9), need(1, "a", 2, 3)])[0].free_nbytes == 3 * MIB


def test_a_disk_that_does_not_say_what_is_free_is_not_short() -> None:
    assert preflight.shortage([need(0, "a", 10**6, None)]) == []
    assert len(preflight.shortage([need(0, "a", 10**6, None), need(1, "a", 0, 5)])) == 1


def test_nobody_needs_anything_nothing_is_short() -> None:
    assert preflight.shortage([]) == []
    assert preflight.shortage([need(0, "a", 0, 0)]) == []


def test_a_need_arrives_as_it_was_sent() -> None:
    for sent in (need(3, "a", 5, 9, 4), need(3, "a", 5, None)):
        assert DiskNeed.from_json(sent.to_json()) == sent


def test_a_measured_disk_is_the_one_the_path_is_on(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    found = DiskNeed.measure(tmp_path / "inside", rank=1, size=Size(7, 3))
    assert found.disk == DiskNeed.measure(tmp_path, rank=0, size=Size(0)).disk
    assert found.disk != DiskNeed.measure(Path("/proc"), rank=0, size=Size(0)).disk
    assert found.free_nbytes is not None
    assert found.free_nbytes > 0
    assert (found.again().rank, found.again().need_nbytes, found.again().folder_nbytes) == (1, 7, 3)


def test_a_file_system_that_says_0_of_everything_has_not_said_what_is_free() -> None:
    assert DiskNeed.measure(Path("/proc"), rank=0, size=Size(0)).free_nbytes is None


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DiskNeed.measure(tmp_path / "nowhere", rank=0, size=Size(0))


def test_the_predicted_size_counts_header_tensors_documents_and_table() -> None:
    pieces = [Piece("w", "F32", (1024, 1024), (0, 0), (1024, 1024)), Piece("b", "BF16", (7,), (0,), (7,))]
    without = preflight.predicted(pieces)
    header, table = 4096, 16 * 5
    assert without == header + 4 * MIB + 14 + table
    assert preflight.predicted(pieces, 100) == without + 100
    assert preflight.predicted([]) == header + 16


# --- making room ----------------------------------------------------------------------------------


OLD, MIDDLE, NEW, OTHER = (Attempt(step, f"1-cafecafe-{step}") for step in (1, 2, 3, 4))


class Reluctant(PosixStore):
    """Does not delete what is named so."""

    sticky = ""

    def delete(self, key: str) -> None:
        if self.sticky and self.sticky in key:
            raise StoreAccessError("delete", key, "permission denied")
        super().delete(key)


@pytest.fixture
def local(tmp_path: Path) -> Reluctant:
    """Two ranks and one of a larger job before, on one disk."""
    store = Reluctant(tmp_path)
    for attempt in (OLD, MIDDLE, NEW, OTHER):
        store.put(attempt.manifest, b"{}")
        for rank in (0, 1, 2):
            store.put(attempt.shard(rank), bytes(100 + rank))
    return store


def left(store: PosixStore) -> list[tuple[int, str]]:
    shards = [entry.key for entry in store.list("data/")]
    return [(int(key.split("step-")[1][:12]), key[-13:-12]) for key in shards]


@pytest.fixture
def freed(local: Reluctant) -> Callable[..., int]:
    return lambda rank, uploaded, keep: preflight.free_up(local, rank=rank, world_size=2, uploaded=uploaded, keep=keep)


def test_only_own_shards_of_committed_checkpoints_go_and_what_is_kept_stays(
    local: Reluctant, freed: Callable[..., int]
) -> None:
    assert freed(0, {OLD, MIDDLE, NEW}, {NEW}) == 2 * (100 + 102)  # those of rank 2, which is no more, as well

    assert left(local) == [(1, "1"), (2, "1"), (3, "0"), (3, "1"), (3, "2"), (4, "0"), (4, "1"), (4, "2")]
    assert {entry.key for entry in local.list("manifests/")} == {NEW.manifest, OTHER.manifest}


def test_what_is_not_known_to_be_committed_never_goes(local: Reluctant, freed: Callable[..., int]) -> None:
    before = left(local)
    assert freed(1, set(), set()) == 0
    assert left(local) == before


def test_the_oldest_goes_first(local: Reluctant, freed: Callable[..., int]) -> None:
    local.sticky = MIDDLE.shard(1)
    with pytest.raises(StoreError):
        freed(1, {NEW, MIDDLE, OLD}, set())
    assert [shard for shard in left(local) if shard[1] == "1"] == [(2, "1"), (3, "1"), (4, "1")]
