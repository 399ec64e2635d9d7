"""The parts of ``dcpsvc doctor``: what it concludes from a machine, a store, several ranks and a measurement."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc.commandline.common import size_in_bytes, time_in_seconds
from dcpsvc.doctor import machine, place, rehearsal, table
from dcpsvc.doctor.findings import Finding, Verdict, merged, ok, worst
from dcpsvc.doctor.forecast import Measured, best_interval_s, forecast
from dcpsvc.errors import (
    DcpsvcError,
    NoBucketError,
    StoreAccessError,
    StoreFullError,
    StoreNotFoundError,
    StoreUnavailableError,
)
from dcpsvc.storage.base import Credentials, Store
from dcpsvc.storage.memory import MemoryStore
from dcpsvc.storage.open import open_store
from dcpsvc.storage.posix import PosixStore
from dcpsvc.tools import remedies

if TYPE_CHECKING:
    from collections.abc import Callable

SHM = "/dev/shm"  # noqa: S108 - what is examined
MEASURED = Measured(shard_nbytes=1 << 30, ranks=4, blocked_s=0.1, local_s=1.0, commit_s=4.0, load_s=2.0)


def store(kind: type[MemoryStore] = MemoryStore) -> MemoryStore:
    return kind(uuid.uuid4().hex)


# --- the machine ----------------------------------------------------------------------------------

MOUNTS = """\
22 1 259:1 / / rw,relatime shared:1 - overlay overlay rw,lowerdir=/x
23 22 0:21 / /dev/shm rw shared:2 - tmpfs tmpfs rw
25 24 259:3 / /net/nvme\\040one rw - xfs /dev/nvme1n1 rw
24 22 0:50 / /net rw shared:3 - nfs4 server:/export rw
26 22 0:51 / /bucket rw - fuse.s3fs s3fs rw
""".splitlines()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/x", "overlay"),
        (f"{SHM}/ckpt", "tmpfs"),
        ("/net/runs", "nfs4"),
        ("/net/nvme one/ckpt", "xfs"),
        ("/network", "overlay"),
        ("/bucket/a", "fuse.s3fs"),
    ],
)
def test_a_path_is_on_the_nearest_mount_above_it(path, kind):
    assert machine.mount_of(Path(path), MOUNTS)[0] == kind


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("ext4", "ok"),
        ("nfs4", "warn"),
        ("overlay", "warn"),
        ("fuse.juicefs", "warn"),
        ("lustre", "warn"),
        ("tmpfs", "note"),
    ],
)
def test_a_local_tier_that_is_not_local_is_warned_of_with_a_remedy(tmp_path, kind, verdict):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(f"22 1 0:9 / / rw - {kind} x rw\n")
    found = machine.local_kind(machine.Machine(local=tmp_path / "local", proc=tmp_path))
    assert found.verdict == verdict
    assert kind in found.found
    assert bool(found.remedy) == (verdict == "warn")


def test_this_machine_can_be_examined_and_nothing_stays(tmp_path):
    found = machine.examine(machine.Machine(local=tmp_path / "local", shard_nbytes=1 << 20))
    assert len(found) == 8
    assert {each.name for each in found if each.verdict == "fail"} <= {SHM, "open files"}
    assert list((tmp_path / "local").iterdir()) == []


def test_a_tmpfs_of_this_machine_is_recognised():
    assert machine.mount_of(Path(SHM), Path("/proc/self/mountinfo").read_text().splitlines())[0] == "tmpfs"


def test_a_disk_that_cannot_hold_the_checkpoints_fails_with_numbers(tmp_path):
    small = machine.Machine(local=tmp_path, shard_nbytes=1 << 60, ranks=8)
    found = machine.disk_space(small)
    assert found.verdict == "fail"
    assert "24576.00 PiB" in found.found
    assert machine.disk_space(dataclasses.replace(small, shard_nbytes=1)).verdict == "ok"


def test_a_disk_that_cannot_hold_the_adapter_folders_fails_with_numbers(tmp_path):
    small = machine.Machine(local=tmp_path, shard_nbytes=1, folder_nbytes=1 << 60)
    found = machine.disk_space(small)
    assert (found.verdict, found.found.partition("need ")[2]) == (
        "fail", "3072.00 PiB, 1024.00 PiB of each for the adapter folder",
    )  # fmt: skip
    assert machine.disk_space(dataclasses.replace(small, folder_nbytes=1)).verdict == "ok"


def test_memory_too_small_for_copies_is_said_before_the_first_save(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 2048 kB\nMemAvailable: 1024 kB\n")
    found = machine.memory(machine.Machine(local=tmp_path, shard_nbytes=1 << 20, proc=tmp_path))
    assert (found.verdict, found.found.partition(" free")[0]) == ("warn", "1.00 MiB")


@pytest.mark.parametrize(("limit", "verdict"), [(100, "fail"), (1024, "warn"), (65536, "ok"), (-1, "ok")])
def test_a_low_limit_of_open_files_is_told(limit, verdict):
    assert machine.open_files(limit).verdict == verdict


@pytest.mark.parametrize(("text", "verdict"), [("0\n", "note"), ("1048576\n", "ok")])
def test_a_kernel_that_gathers_much_before_it_writes_is_told(tmp_path, text, verdict):
    vm = tmp_path / "sys" / "vm"
    vm.mkdir(parents=True)
    (vm / "dirty_bytes").write_text(text)
    (vm / "dirty_ratio").write_text("20\n")
    (tmp_path / "meminfo").write_text(f"MemTotal: {1 << 30} kB\n")  # 1 TiB
    assert machine.dirty_pages(machine.Machine(local=tmp_path, proc=tmp_path)).verdict == verdict


@pytest.mark.parametrize(("cpus", "ranks", "verdict"), [({0}, 1, "warn"), ({0, 1}, 2, "note"), ({0, 1, 2, 3}, 2, "ok")])
def test_a_rank_that_is_bound_to_one_processor_is_warned_of(tmp_path, cpus, ranks, verdict):
    masks = (frozenset(cpus),) * ranks
    found = machine.processors(machine.Machine(local=tmp_path, ranks=ranks, cpus=frozenset(cpus), masks=masks))
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("masks", "verdict"),
    [([{0, 1}, {2, 3}, {4, 5}], "ok"), ([{0, 1}, {1, 2}], "warn"), ([{0, 1, 2, 3}] * 2 + [{4, 5}], "ok")],
    ids=["each its own", "overlapping", "by socket"],
)
def test_processors_count_by_the_ranks_that_share_them(tmp_path, masks, verdict):
    here = tuple(map(frozenset, masks))
    found = machine.processors(machine.Machine(local=tmp_path, ranks=len(masks), cpus=here[0], masks=here))
    assert found.verdict == verdict, found


class Misdating(PosixStore):
    """Its clock is two days ahead."""

    def written_s(self, key):
        return super().written_s(key) + 2 * 86400.0


def test_a_store_whose_clock_is_far_off_is_warned_of(tmp_path):
    assert place.store_clock(PosixStore(tmp_path), "clock").verdict == "ok"
    found = place.store_clock(Misdating(tmp_path), "clock")
    assert (found.verdict, found.found) == ("warn", "172800.0 s ahead of this machine's")
    assert not list(tmp_path.rglob("clock"))


# --- the run root ---------------------------------------------------------------------------------


class NoDelete(MemoryStore):
    def delete(self, key):
        raise StoreAccessError("delete", key, "AccessDenied")


class Lagging(MemoryStore):
    """Shows an object only from the third listing on."""

    listings = 0

    def list(self, prefix):
        self.listings += 1
        return super().list(prefix) if self.listings > 2 else []


class AllWin(MemoryStore):
    """As OpenStack Swift does, and rclone."""

    def create(self, key, data):
        self.put(key, data)
        return True


class Rots(MemoryStore):
    def get(self, key, *, max_nbytes):
        return bytes(byte ^ 1 for byte in super().get(key, max_nbytes=max_nbytes))


def test_a_good_store_passes(tmp_path):
    for good in (store(), PosixStore(tmp_path / "root")):
        assert place.permissions(good, "a").verdict == "ok"
        assert place.listings(good, "b").verdict == "ok"
        assert place.conditional_create(good, "c").verdict == "ok"
        assert good.list("") == []


def test_what_is_not_permitted_is_named():
    found = place.permissions(store(NoDelete), "a")
    assert (found.verdict, found.found.partition(":")[0]) == ("fail", "cannot delete")
    assert "permission" in found.remedy or "give this user" in found.remedy


def test_a_store_that_changes_bytes_fails():
    assert place.permissions(store(Rots), "a").verdict == "fail"


def test_listings_that_lag_are_told():
    found = place.listings(store(Lagging), "a")
    assert found.verdict == "warn"
    assert "lag behind" in found.found


def test_a_store_on_which_all_racers_win_is_noted_and_does_not_fail():
    found = place.conditional_create(store(AllWin), "a")
    assert found.verdict == "note"
    assert "8, 8, 8, 8, 8" in found.found


def test_a_rank_that_sees_another_root_fails():
    mine, theirs = store(), store()
    mine.put("shared", b"token")
    assert place.shared(mine, "shared", b"token").verdict == "ok"
    assert place.shared(theirs, "shared", b"token").verdict == "fail"
    theirs.put("shared", b"other")
    assert place.shared(theirs, "shared", b"token").verdict == "fail"


def test_clocks_that_disagree_are_named_by_rank():
    assert place.clocks([100.0, 100.4], 0.1).verdict == "ok"
    found = place.clocks([100.0, 100.2, 160.0], 0.1)
    assert found.verdict == "warn"
    assert "ranks 0 and 2" in found.remedy


# --- several ranks --------------------------------------------------------------------------------


def bad(name: str, found: str) -> Finding:
    return Finding(name=name, verdict=Verdict.FAIL, found=found, remedy="mend it")


def test_the_worst_of_all_ranks_is_told_with_the_ranks_that_found_it():
    by_rank = [
        [ok("disk", "fine")],
        [bad("disk", "full")],
        [bad("disk", "full")],
        [bad("disk", "full")],
        [ok("disk", "-")],
    ]
    (found,) = merged(by_rank)
    assert (found.verdict, found.found, found.remedy) == ("fail", "ranks 1-3: full", "mend it")
    assert merged([[ok("disk", "fine")], [bad("disk", "full")]])[0].found == "rank 1: full"
    assert merged([[bad("disk", "full")]] * 2)[0].found == "all ranks: full"
    assert merged([[ok("disk", "fine")], [bad("x", "y")]])[0] == ok("disk", "fine")


def test_a_verdict_travels_between_ranks():
    assert Finding.from_json(bad("disk", "full").to_json()) == bad("disk", "full")
    assert worst([]) is Verdict.OK


# --- what to expect -------------------------------------------------------------------------------


def test_the_interval_is_dalys():
    # By hand: d = 60 s, M = 24 h; sqrt(2dM) = 3219.938, sqrt(d/2M) = 0.0186339
    assert best_interval_s(60, 86400) == pytest.approx(3219.938 * (1 + 0.0186339 / 3 + 0.0186339**2 / 9) - 60, rel=1e-6)


@given(st.floats(1e-3, 1e3), st.floats(1e4, 1e7))
def test_no_other_interval_loses_less(stall_s, mtbf_s):
    def lost(interval_s: float) -> float:
        """Daly's own model of the run time, per unit of useful work. Equation 20, no restart time."""
        return mtbf_s * math.expm1((interval_s + stall_s) / mtbf_s) / interval_s

    best = best_interval_s(stall_s, mtbf_s)
    assert lost(best) <= min(lost(best * 0.8), lost(best * 1.25)) * (1 + 1e-9)


def test_a_save_longer_than_the_time_between_failures_leaves_nothing_to_gain():
    assert best_interval_s(1000, 100) == 100


def test_a_forecast_scales_with_the_bytes_of_a_rank():
    here = forecast(MEASURED, 4 << 30, 86400.0)
    assert (here.stall_s, here.local_s, here.commit_s) == (0.1, 1.0, 4.0)
    larger = forecast(MEASURED, 40 << 30, 86400.0)
    assert (larger.stall_s, larger.commit_s) == (pytest.approx(1.0), pytest.approx(40.0))
    assert larger.lost > here.lost
    assert forecast(MEASURED, 40 << 30, 86400.0, ranks=40).stall_s == pytest.approx(0.1)


def test_what_a_save_costs_whatever_its_size_is_not_scaled():
    smaller = {"shard_nbytes": 1 << 27, "blocked_s": 0.065, "local_s": 0.3, "commit_s": 4.5}
    measured = dataclasses.replace(MEASURED, smaller=smaller)
    expected = forecast(measured, 40 << 30, 86400.0)
    assert expected.stall_s == pytest.approx(0.06 + 10 * 0.04)
    assert expected.local_s == pytest.approx(0.2 + 10 * 0.8)
    assert expected.commit_s == pytest.approx(40.0)  # the larger was the faster: by its bytes alone


def test_where_memory_has_no_room_for_copies_training_waits_until_all_is_written():
    copied = forecast(MEASURED, 4 << 30, 86400.0)
    streamed = forecast(MEASURED, 4 << 30, 86400.0, copied=False)
    assert (copied.stall_s, streamed.stall_s) == (0.1, 1.0)
    assert streamed.interval_s > copied.interval_s
    assert streamed.lost > copied.lost


def test_what_is_lost_is_what_saves_and_repeats_take():
    # By hand: a save every 1000 s costs 0.1 s; a failure each 10,000 s costs 500 + 1000 + 2 s.
    found = forecast(dataclasses.replace(MEASURED, blocked_s=0.1, commit_s=1000.0), 4 << 30, 10_000.0)
    assert found.interval_s == 1000.0
    assert found.lost == pytest.approx(0.1 / 1000 + (500 + 1000 + 2) / 10_000)


def test_the_advice_names_the_checkpoint_it_is_for():
    first, second = table.expectations(forecast(MEASURED, 1 << 30, 86400.0, ranks=1, step=70))
    assert first.startswith("a checkpoint of 1.00 GiB on 1 rank, like step 70 there: training waits about 0.1 s, ")
    assert second.startswith("with a failure every 24 h 0 min, save every ")
    assert table.expectations(forecast(MEASURED, 4 << 30, 86400.0))[0].startswith(
        "a checkpoint of 4.00 GiB on 4 ranks: "
    )


@pytest.mark.parametrize(
    ("where", "said", "not_said"),
    [("/runs/a", "mount", "AWS"), ("s3://bucket/a", "AWS_PROFILE", "mount"), ("gs://bucket/a", "-o KEY", "AWS")],
)
def test_the_remedy_is_one_for_the_kind_of_place(where, said, not_said):
    for kind in (StoreAccessError, StoreFullError, StoreUnavailableError):
        text = remedies.remedy(kind("put", where, "no"))
        assert text
        assert not_said not in text or kind is not StoreAccessError
    assert said in remedies.remedy(StoreAccessError("put", where, "no"))
    assert remedies.remedy(StoreNotFoundError("get", where, "no")) == ""


def test_who_named_a_bucket_that_is_not_there_is_told_to_create_it_or_to_look_at_the_name():
    text = remedies.remedy(NoBucketError("list", "s3://bucket/a", "there is no such bucket"))
    assert text.startswith("create the bucket, or correct its name")
    assert "endpoint" in text


def test_a_grace_that_is_too_short_for_the_model_is_told():
    from dcpsvc.doctor.examination import preemption

    expected = forecast(MEASURED, 40 << 30, 86400.0)  # on the local disks after 10 s
    assert preemption(expected, 25.0).verdict == "ok"
    assert preemption(expected, 15.0).verdict == "warn"


def test_a_save_is_not_advised_before_the_one_before_it_is_committed():
    slow = dataclasses.replace(MEASURED, commit_s=5000.0)
    assert forecast(slow, 4 << 30, 86400.0).interval_s == 5000.0


@pytest.mark.parametrize(
    ("text", "nbytes"), [("105GB", 105 * 10**9), ("1.5TiB", 3 << 39), ("4096", 4096), ("64MiB", 64 << 20), ("7k", 7000)]
)
def test_sizes_are_read_as_people_write_them(text, nbytes):
    assert size_in_bytes(text) == nbytes


@pytest.mark.parametrize(("text", "seconds"), [("24h", 86400), ("90min", 5400), ("30s", 30), ("7d", 604800), ("5", 5)])
def test_times_are_read_as_people_write_them(text, seconds):
    assert time_in_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "many", "-5GB", "5XB", "1e3"])
def test_other_sizes_are_refused_with_an_example(text):
    with pytest.raises(Exception, match="write 105GB"):
        size_in_bytes(text)


# --- credentials ----------------------------------------------------------------------------------


def signed_with(monkeypatch, left_s: float | None, *, token: bool = True) -> Store:
    """A bucket's client that has its credentials from the environment; nothing is sent."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-nobody")
    if token:
        monkeypatch.setenv("AWS_SESSION_TOKEN", "temporary")
    if left_s is not None:
        ends = datetime.fromtimestamp(time.time() + left_s, UTC).isoformat()
        monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", ends)
    options = {"endpoint_url": "http://127.0.0.1:9", "client_kwargs": {"region_name": "us-east-1"}}
    return open_store("s3://bucket/run", options)


@pytest.mark.parametrize(
    ("left_s", "token", "verdict", "said"),
    [
        (None, False, "ok", "do not end"),
        (None, True, "note", "nobody says when"),
        (3 * 86400.0, True, "ok", "end in 7"),
        (7200.0, True, "warn", "a job dies with them"),
        (1800.0, True, "fail", "before a save is done"),
    ],
)
def test_credentials_that_end_soon_are_found_before_they_do(monkeypatch, left_s, token, verdict, said):
    (found,) = place.credentials(signed_with(monkeypatch, left_s, token=token), 2000.0, time.time())
    assert (found.verdict, said in found.found) == (verdict, True), found
    assert "of-nobody" not in str(found)


def test_a_role_that_is_renewed_is_well_and_a_directory_has_no_credentials():
    class Role(MemoryStore):
        def credentials(self) -> Credentials:
            return Credentials(kind="iam-role", ends_s=time.time() + 60, renewed=True, temporary=True)

    (found,) = place.credentials(Role(uuid.uuid4().hex), 1.0, time.time())
    assert (found.verdict, found.found) == ("ok", "iam-role: renewed by the client before they end")
    assert place.credentials(store(), 1.0, time.time()) == []


# --- the rehearsal --------------------------------------------------------------------------------


def test_a_run_root_that_takes_a_shard_and_never_answers_is_given_up_in_a_time_that_its_size_explains(
    tmp_path, monkeypatch
):
    answer = threading.Event()

    class Stuck(PosixStore):
        def put_file(self, key: str, path: Path, *, progress: Callable[[int], None] | None = None) -> None:
            answer.wait()
            raise StoreAccessError("put_file", key, "too late")

    monkeypatch.setattr(rehearsal, "_SETTLE_S", 1.0)
    (tmp_path / "root").mkdir()
    payload = torch.zeros(1000, dtype=torch.int64)
    try:
        with pytest.raises(DcpsvcError, match=r"within|after") as raised:
            rehearsal._save(Stuck(tmp_path / "root"), tmp_path / "local", payload, {}, timeout_s=1.0)
    finally:
        answer.set()
    assert "upload" in str(raised.value)
