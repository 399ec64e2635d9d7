"""Ranks that need the same bytes of a checkpoint get them from each other: the run root gives each byte once."""

import functools
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dcpsvc.format import keys
from dcpsvc.ranks.exchange import Exchange
from dcpsvc.ranks.messages import LostPeerError
from dcpsvc.storage.posix import PosixStore
from tests.ranks.harness import die, raised_by, run_ranks, values
from tests.ranks.models import Training, checkpointer, flip_byte

WORLD, WIDTH, DEPTH = 3, 700, 5
MIB = 1 << 20
DOCUMENTS_NBYTES = 5 * MIB
"""At most so much each rank reads by itself: beginning and end of its own shard and of rank 0's."""


class Far(PosixStore):
    """A run root that is no disk of this machine: what is read from it counts."""

    cached = False
    proves = False

    def __init__(self, root):
        super().__init__(root)
        self.given_out = {}

    def read(self, key, begin, end):
        self.note(key, end - begin)
        return super().read(key, begin, end)

    def read_into(self, key, begin, views):
        self.note(key, sum(map(len, views)))
        super().read_into(key, begin, views)

    def stream_into(self, key, begin, views, look, *, once=False):
        self.note(key, sum(map(len, views)))
        return super().stream_into(key, begin, views, look, once=once)

    def stream(self, key, begin, end, look):
        assert self.proves, "nothing far is read only to be proven"
        self.note(key, end - begin)
        return super().stream(key, begin, end, look)

    def note(self, key, nbytes):
        if key.startswith(keys.DATA):
            rank = keys.rank_of(key)
            self.given_out[rank] = self.given_out.get(rank, 0) + nbytes


class Mounted(Far):
    """A directory on a file server that every rank's node has mounted for itself."""

    cached = True
    node = ""

    @property
    def page_cache(self):
        return f"{super().page_cache}-{self.node}"


class Near(Mounted):
    """The same, and whoever reads by himself has proven it first, in his page cache."""

    proves = True


class OnOneNode(Near):
    """Likewise, where all ranks are on one node."""


def save(rank, world, folder, kind):
    training = Training(kind, rank, width=WIDTH, depth=DEPTH)
    training.train(2)
    with checkpointer(folder / "run", training.state, local=folder / f"node-{rank}") as ckpt:
        ckpt.save(2).wait(60)
    return training.fingerprint()


def resume(rank, world, folder, kind, meddle=None, *, root=Far, read_together=(None,) * WORLD):
    training = Training(kind, rank, width=WIDTH, depth=DEPTH, seed=5)
    store, told = root(folder / "run"), []
    store.node = 0 if root is OnOneNode else rank
    with checkpointer(
        folder, training.state, store=store, local=folder / f"node-{rank}", save_last=False, on_event=told.append,
        sync_timeout_s=5.0 if meddle else 20.0, read_together=read_together[rank],
    ) as ckpt:  # fmt: skip
        store.given_out.clear()
        if meddle and rank == 1:
            meddle()
        raised = raised_by(ckpt.resume)
        if raised:
            return {"raised": raised}
    detail = next(event.detail for event in told if event.name == "resumed")
    return {"raised": None, "prints": training.fingerprint(), "root": store.given_out, "detail": detail}


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def kept(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp(f"saved-{request.param}")
    prints = values(run_ranks(WORLD, save, folder, request.param))
    return folder, request.param, prints[0]


@pytest.fixture
def saved(kept, tmp_path):
    shutil.copytree(kept[0], tmp_path / "job")
    return tmp_path / "job", *kept[1:]


def resumed(saved, meddle=None, world=WORLD, **how):
    """Of each rank what it read from the root, by shard; and what it said."""
    folder, kind, prints = saved
    found = values(run_ranks(world, functools.partial(resume, **how), folder, kind, meddle, timeout_s=55.0))
    for rank in found:
        assert rank["raised"] is None
        assert rank["prints"] == prints
    return [rank["root"] for rank in found], found[0]["detail"]


def shard_nbytes(saved):
    shards = sorted(Path(saved[0], "run", "data").rglob("*.safetensors"))
    return [path.stat().st_size for path in shards]


def empty_disks(saved, *nodes):
    for node in nodes:
        shutil.rmtree(saved[0] / f"node-{node}")


@pytest.mark.parametrize("root", [Far, Mounted])
@pytest.mark.parametrize("world", [WORLD, 2])
def test_on_empty_disks_the_root_gives_each_byte_once(saved, world, root):
    empty_disks(saved, 0, 1, 2)
    taken, detail = resumed(saved, world=world, root=root)
    whole, given = sum(shard_nbytes(saved)), sum(nbytes for root in taken for nbytes in root.values())
    assert whole - MIB <= given <= whole + world * DOCUMENTS_NBYTES
    assert "from other ranks" in detail
    assert "from the run root" in detail


def test_a_directory_that_all_ranks_read_through_one_page_cache_is_read_by_each_for_itself(saved):
    empty_disks(saved, 0, 1, 2)
    taken, detail = resumed(saved, root=OnOneNode)
    assert "from other ranks" not in detail
    if saved[1] == "ddp":
        assert sum(nbytes for root in taken for nbytes in root.values()) > 3 * sum(shard_nbytes(saved))


@pytest.mark.parametrize("root", [Far, Near])
def test_ranks_told_to_read_by_themselves_get_nothing_from_each_other(saved, root):
    empty_disks(saved, 0, 1, 2)
    taken, detail = resumed(saved, root=root, read_together=(False,) * WORLD)
    assert "from other ranks" not in detail
    assert all(taken)
    if saved[1] == "ddp":
        assert all(sum(root.values()) > sum(shard_nbytes(saved)) for root in taken)


def test_ranks_told_to_read_together_do_so_behind_one_page_cache_too(saved):
    empty_disks(saved, 0, 1, 2)
    taken, detail = resumed(saved, root=OnOneNode, read_together=(True,) * WORLD)
    whole, given = sum(shard_nbytes(saved)), sum(nbytes for root in taken for nbytes in root.values())
    assert "from other ranks" in detail
    assert whole - MIB <= given <= whole + WORLD * DOCUMENTS_NBYTES


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("root", [Far, OnOneNode])
def test_ranks_that_were_told_different_things_do_as_rank_0_was_told(saved, root, *, first):
    empty_disks(saved, 0, 1, 2)
    _, detail = resumed(saved, root=root, read_together=(first, not first, None))
    assert ("from other ranks" in detail) is first


def test_what_the_disk_of_one_node_holds_is_not_read_from_the_root(saved):
    empty_disks(saved, 0, 2)
    taken, detail = resumed(saved)
    assert not any(root.get(1) for root in taken)
    assert "from local disks" in detail


def test_when_every_node_has_its_own_shard_the_root_gives_documents_only(saved):
    taken, _ = resumed(saved)
    assert not taken[0]
    assert all(set(root) <= {0} and root.get(0, 0) <= DOCUMENTS_NBYTES // 2 for root in taken)


def test_a_damaged_shard_on_the_disk_of_a_peer_comes_from_the_root(saved):
    empty_disks(saved, 0, 2)
    (shard,) = (saved[0] / "node-1").rglob("*.safetensors")
    flip_byte(shard)
    taken, _ = resumed(saved)
    assert any(root.get(1) for root in taken)


def large(value):
    """A model of which each of two ranks holds 64 MiB."""
    model = torch.nn.Linear(8192, 4096, bias=False)
    torch.nn.init.constant_(model.weight, value)
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def save_large(rank, world, folder, kind=large):
    with checkpointer(
        folder / "run", {"model": kind(1.0)}, local=folder / f"node-{rank}", staging_nbytes=MIB, save_last=False
    ) as ckpt:
        ckpt.save(2).wait(60)


def resume_large(rank, world, folder, kind=large):
    store, told, model = Far(folder / "run"), [], kind(0.0)
    with checkpointer(
        folder, {"model": model}, store=store, local=folder / f"node-{rank}", staging_nbytes=MIB, save_last=False,
        on_event=told.append,
    ) as ckpt:  # fmt: skip
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        ckpt.resume()
        grown = resident("VmHWM") - before
    detail = next(event.detail for event in told if event.name == "resumed")
    held = model.weight.to_local() if kind is large else model.weight
    return {"root": store.given_out, "grown": grown, "detail": detail, "right": bool((held == 1.0).all())}


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def large_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    values(run_ranks(2, save_large, folder))
    return folder


def test_what_every_node_has_is_read_in_place_and_no_second_copy_of_the_model_is_held(large_saved):
    for rank in values(run_ranks(2, resume_large, large_saved)):
        assert rank["right"]
        assert set(rank["root"]) <= {0}
        assert rank["root"].get(0, 0) <= DOCUMENTS_NBYTES // 2
        assert rank["grown"] < 40 * MIB
        assert "other ranks" not in rank["detail"]


def test_when_one_node_s_disk_is_empty_only_its_shard_comes_from_the_root(large_saved, tmp_path):
    shutil.copytree(large_saved, tmp_path / "job")
    shutil.rmtree(tmp_path / "job" / "node-1")
    one, other = values(run_ranks(2, resume_large, tmp_path / "job"))
    assert one["right"]
    assert other["right"]
    assert not one["root"].get(1)
    assert 64 * MIB <= other["root"][1] <= 64 * MIB + DOCUMENTS_NBYTES


def test_a_shard_damaged_on_its_own_node_comes_from_the_root_before_anything_is_touched(large_saved, tmp_path):
    shutil.copytree(large_saved, tmp_path / "job")
    (shard,) = (tmp_path / "job" / "node-1").rglob("*.safetensors")
    flip_byte(shard)
    one, other = values(run_ranks(2, resume_large, tmp_path / "job"))
    assert one["right"]
    assert other["right"]
    assert one["grown"] < 40 * MIB
    assert 64 * MIB <= other["root"][1] <= 65 * MIB


def replicated(value):
    """A model of 320 MiB that each of two ranks holds."""
    model = torch.nn.Linear(8192, 10240, bias=False)
    torch.nn.init.constant_(model.weight, value)
    return model


def test_what_all_ranks_pass_on_waits_on_their_disks_and_not_in_memory(tmp_path):
    values(run_ranks(2, save_large, tmp_path, replicated, timeout_s=55.0))
    for node in (0, 1):
        shutil.rmtree(tmp_path / f"node-{node}")
    both = values(run_ranks(2, resume_large, tmp_path, replicated, timeout_s=55.0))
    for rank in both:
        assert rank["right"]
        assert rank["grown"] < 256 * MIB
        assert "from other ranks" in rank["detail"]
    assert sum(nbytes for rank in both for nbytes in rank["root"].values()) <= 320 * MIB + 2 * DOCUMENTS_NBYTES


def flip_what_goes_out():
    def swap(self, outgoing, incoming, true=Exchange.swap):
        for parcel in outgoing[:1]:
            parcel.view[7] ^= 1
        true(self, outgoing, incoming)

    Exchange.swap = swap


def die_in_the_middle():
    Exchange.swap = lambda *_: die()


def fail_to_connect():
    def renew(self, generation):
        raise LostPeerError("no way")

    Exchange.renew = renew


def test_a_block_that_is_damaged_on_its_way_is_refused_and_every_rank_reads_by_itself(saved):
    empty_disks(saved, 0, 1, 2)
    taken, detail = resumed(saved, flip_what_goes_out)
    assert "from other ranks" not in detail
    if saved[1] == "ddp":
        assert sum(nbytes for root in taken for nbytes in root.values()) > 3 * sum(shard_nbytes(saved))


def test_a_rank_that_cannot_take_part_leaves_all_to_themselves(saved):
    empty_disks(saved, 0, 1, 2)
    _, detail = resumed(saved, fail_to_connect)
    assert "from other ranks" not in detail


def test_a_rank_killed_while_all_read_together_is_named_by_the_others(saved):
    empty_disks(saved, 0, 1, 2)
    one, victim, other = run_ranks(WORLD, resume, saved[0], saved[1], die_in_the_middle, timeout_s=55.0)
    assert victim.signal
    for rank in (one, other):
        assert rank.value["raised"].type == "RestoreFailedError"
        assert rank.value["raised"]["missing"] == [1]
        assert not rank.value["raised"]["changed"]
