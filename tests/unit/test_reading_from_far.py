"""A module whose checkpoint is far is read once and waits on the node's disk, not in memory, until all is proven."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import pytest
import torch

import dcpsvc
from dcpsvc.errors import NoValidCheckpointError
from dcpsvc.storage.posix import PosixStore
from dcpsvc.storage.scatter import PIECE_NBYTES

MIB = 2**20
ROWS = 72 * MIB // 4096
NBYTES = ROWS * 4096
SHM = "/dev/shm"  # noqa: S108 - where every Linux has one


class Far(PosixStore):
    """No disk of this machine: what is read from it counts."""

    cached = False
    given_out = 0

    def read_into(self, key, begin, views):
        self.given_out += sum(map(len, views))
        super().read_into(key, begin, views)

    def stream_into(self, key, begin, views, look, *, once=False):
        self.given_out += sum(map(len, views))
        return super().stream_into(key, begin, views, look, once=once)

    def stream(self, key, begin, end, look):
        raise AssertionError("nothing far is read only to be proven")


def model(value):
    made = torch.nn.Linear(1024, ROWS, bias=False)
    torch.nn.init.constant_(made.weight, value)
    return made


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("far")
    state = {"model": model(2.0), "few": torch.arange(1000)}
    with dcpsvc.Checkpointer(
        folder / "root", state, local=folder / "local", save_last=False, staging_nbytes=MIB
    ) as ckpt:
        ckpt.save(1).wait(60)
    return folder / "root"


def resume(root, local, fresh):
    """What came from the run root, and how far memory rose."""
    store = Far(root)
    state = {"model": fresh, "few": torch.zeros(1000, dtype=torch.int64)}
    with dcpsvc.Checkpointer(store, state, local=local, save_last=False, staging_nbytes=MIB) as ckpt:
        store.given_out = 0
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        ckpt.resume()
        grown = resident("VmHWM") - before
    assert torch.equal(ckpt.state["few"], torch.arange(1000))
    return store.given_out, grown


def test_it_is_read_once_into_no_second_copy_and_nothing_of_it_stays_on_the_disk(root, tmp_path, caplog):
    fresh = model(0.0)
    place = fresh.weight.data_ptr()
    given_out, grown = resume(root, tmp_path / "local", fresh)
    assert bool((fresh.weight == 2.0).all())
    assert fresh.weight.data_ptr() == place
    assert given_out <= 1.02 * NBYTES
    assert grown < 9 * PIECE_NBYTES
    assert sum(path.stat().st_size for path in (tmp_path / "local").rglob("*") if path.is_file()) < MIB
    assert "twice in memory" not in caplog.text


def test_damage_is_found_before_anything_is_touched(root, tmp_path):
    (shard,) = root.rglob("*.safetensors")
    data = shard.read_bytes()
    fresh = model(0.0)
    try:
        shard.write_bytes(data[: NBYTES // 2] + bytes([data[NBYTES // 2] ^ 1]) + data[NBYTES // 2 + 1 :])
        with pytest.raises(NoValidCheckpointError):
            resume(root, tmp_path / "local", fresh)
    finally:
        shard.write_bytes(data)
    assert not fresh.weight.any()


@pytest.mark.skipif(f"{SHM} tmpfs" not in Path("/proc/mounts").read_text(), reason="there is no tmpfs here")
def test_where_the_local_tier_is_memory_a_warning_says_that_there_is_a_second_copy(root, caplog):
    local, fresh = Path(SHM, f"dcpsvc-test-{root.stat().st_ino}"), model(0.0)
    try:
        with caplog.at_level(logging.WARNING, "dcpsvc"):
            given_out, _ = resume(root, local, fresh)
    finally:
        shutil.rmtree(local)
    assert bool((fresh.weight == 2.0).all())
    assert given_out <= 1.02 * NBYTES
    (said,) = [record.getMessage() for record in caplog.records if "twice in memory" in record.getMessage()]
    assert re.search(r"rank 0 holds 72\.\d MiB .* are memory", said)


def test_a_load_without_a_local_tier_says_once_that_there_is_a_second_copy(root, caplog):
    fresh = model(0.0)
    with caplog.at_level(logging.INFO, "dcpsvc"):
        dcpsvc.load(Far(root), {"model": fresh})
    assert bool((fresh.weight == 2.0).all())
    (said,) = [record.getMessage() for record in caplog.records if "twice in memory" in record.getMessage()]
    assert re.search(r"holds 72\.\d MiB .*there is no local tier", said)
