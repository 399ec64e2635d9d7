"""R23 R24: too little memory changes how a shard is written and nothing else; too little disk is said, with numbers."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dcpsvc
from dcpsvc import Point
from tests.ranks.harness import raised_by, run_ranks, values
from tests.ranks.models import Training, checkpointer, committed, files, step_files

MIB = 2**20
WIDTH, DEPTH = 250, 2
"""Weights and moments are more than 1 MiB a rank, the least a window can be."""


def attempt(ckpt, step):
    """Save and wait, on this rank."""
    return raised_by(lambda: ckpt.save(step).wait())


# --- memory ---------------------------------------------------------------------------------------


def train_with_one_rank_short_of_memory(rank, world, root, kind, streaming):
    training = Training(kind, rank, width=WIDTH, depth=DEPTH)
    budget = 1 if rank in streaming else None
    with checkpointer(root, training.state, staging_nbytes=budget) as ckpt:
        for step in (1, 2, 3):
            training.step()
            ckpt.save(step)  # and on it goes: what the next step changes must not be in it
            training.step()
        ckpt.wait(40)
        return training.fingerprint()


def train_to_step(rank, world, kind, step):
    """What the checkpoint of a step must hold."""
    training = Training(kind, rank, width=WIDTH, depth=DEPTH)
    training.train(2 * step - 1)
    return told(training, rank)


def told(training, rank):
    """All that a checkpoint brings back; buffers are those of rank 0."""
    buffers = training.buffers() if rank == 0 else None
    return {"weights": training.fingerprint(), "buffers": buffers, "own": training.own()}


def resume_step(rank, world, root, kind, step):
    training = Training(kind, rank, seed=7, width=WIDTH, depth=DEPTH)
    with checkpointer(root, training.state, save_last=False) as ckpt:
        ckpt.resume(step)
        return told(training, rank)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_rank_may_stream_while_the_other_stages_and_the_checkpoint_is_bit_identical(tmp_path, kind):
    root = tmp_path / "run"
    outcomes = run_ranks(2, train_with_one_rank_short_of_memory, root, kind, [1])
    values(outcomes)

    assert committed(root) == [1, 2, 3]
    assert [outcome.log.count("does not fit into") for outcome in outcomes] == [0, 1]
    for step in (1, 3):
        expected = values(run_ranks(2, train_to_step, kind, step))
        assert values(run_ranks(2, resume_step, root, kind, step)) == expected


def fill_up(folder):
    """Take all the room that is left."""
    with (folder / "filler").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(64 * 1024))
            except OSError:
                return


def save_while_a_disk_fills_up(rank, world, root, locals_, budgets):
    """The disk of rank 1 is full from the moment the ranks have agreed on step 2 until step 2 has failed."""
    training = Training("ddp", rank, width=WIDTH, depth=DEPTH)
    training.train(1)
    local, found = Path(locals_[rank]), []

    def on_event(event):
        if event.name == Point.PLAN_AGREED and event.step == 2 and rank == 1:
            fill_up(local)
        if event.name == Point.SAVE_FAILED:
            found.append(event.detail)

    with checkpointer(root, training.state, local=local, staging_nbytes=budgets[rank], on_event=on_event) as ckpt:
        first, second = attempt(ckpt, 1), attempt(ckpt, 2)
        ckpt.wait(30)
        there = [name for name in step_files(root, 2) if not name.startswith("tombstones/")]
        left = step_files(local, 2), there, len(step_files(local, 1)), committed(root)
        losses = training.train(1)
        dist.barrier()
        (local / "filler").unlink(missing_ok=True)
        dist.barrier()
        return {"first": first, "second": second, "left": left, "losses": losses, "third": attempt(ckpt, 3)}


@pytest.fixture
def disk(tmp_path):
    """Makes small disks of a size that can be changed; real ones."""
    mounted = []

    def make(name, nbytes):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if shutil.which("mount") is None:
            pytest.skip("there is no mount command here")
        done = command("mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", folder)
        if done.returncode:
            pytest.skip(f"mounting a disk is not permitted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        assert command("umount", folder).returncode == 0


def command(*words):
    return subprocess.run([shutil.which(words[0]), *map(str, words[1:])], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("budget", [None, 1], ids=["staged", "streamed"])
def test_a_disk_that_is_full_while_a_shard_is_written_fails_the_save_on_all_and_leaves_nothing(tmp_path, disk, budget):
    root = tmp_path / "run"
    locals_ = [disk("nvme0", 40 * MIB), disk("nvme1", 40 * MIB)]

    results = values(run_ranks(2, save_while_a_disk_fills_up, root, locals_, [None, budget]))

    for result in results:
        assert (result["first"], result["third"]) == (None, None)
        assert result["second"].type == "SaveFailedError"
        (failure,) = result["second"]["failures"]
        assert (failure["rank"], failure["phase"], failure["error"]) == (1, "write", "StoreFullError")
        assert "no space left" in failure["text"]
        assert "step 1 remains the newest commit" in result["second"].text
        here, there, before, steps = result["left"]
        assert (here, there, before, steps) == ([], [], 2, [1])
    assert committed(root) == [1, 3]


# --- disks ----------------------------------------------------------------------------------------


class Blob(torch.nn.Module):
    """As many bytes as it is told, in two parameters."""

    def __init__(self, nbytes):
        super().__init__()
        self.one, self.two = (torch.nn.Parameter(torch.zeros(nbytes // 8)) for _ in range(2))


def save_some(rank, world, root, local, steps, nbytes, grow):  # noqa: PLR0917 - as the harness gives them
    """Each rank writes half of ``nbytes`` to one disk. What each save raised, and what is on the disk after it."""
    model, told = Blob(nbytes), []
    with checkpointer(root, {"model": model}, local=local, keep_local=3) as ckpt:
        for step in steps:
            with torch.no_grad():
                model.one.fill_(step)
            raised = attempt(ckpt, step)
            ckpt.wait(30)
            dist.barrier()
            told.append((raised, sorted({name.split("step-")[1][:12].lstrip("0") for name in shards(local)})))
            dist.barrier()
            if rank == 0 and raised is not None and grow:
                assert command("mount", "-o", f"remount,size={grow}", local).returncode == 0
            dist.barrier()
        return told


def shards(local):
    return [name for name in files(local) if name.endswith(".safetensors")]


def test_a_disk_that_is_too_small_for_all_its_ranks_refuses_the_save_with_numbers(tmp_path, disk):
    """Each of the two ranks alone would have room for its half."""
    root, local = tmp_path / "run", disk("nvme", 10 * MIB)

    results = values(run_ranks(2, save_some, root, local, [1, 2, 3], 6 * MIB, 40 * MIB))

    for told in results:
        (first, held), (second, still_held), (third, _) = told
        assert (first, held) == (None, ["1"])
        assert second.type == "SaveFailedError"
        (failure,) = second["failures"]
        assert (failure["phase"], failure["error"]) == ("plan", "StoreFullError")
        assert f"{local}" in failure["text"]
        assert "ranks (0, 1) need 6.0 MiB" in failure["text"]
        assert "MiB free" in failure["text"]
        assert "MiB short" in failure["text"]
        assert "step 1 remains the newest commit" in second.text
        assert still_held == ["1"]
        assert third is None
    assert committed(root) == [1, 3]
    assert values(run_ranks(2, resumed_value, root, local, 6 * MIB)) == [3.0, 3.0]


def resumed_value(rank, world, root, local, nbytes):
    model = Blob(nbytes)
    with checkpointer(root, {"model": model}, local=local, save_last=False) as ckpt:
        ckpt.resume()
    return float(model.one[-1])


def test_room_is_made_from_what_is_whole_at_the_run_root_oldest_first_before_a_save_is_refused(tmp_path, disk):
    """Three shards fit, a fourth does not; ``keep_local`` would keep three and the new one for a moment."""
    root, local = tmp_path / "run", disk("nvme", 21 * MIB)

    results = values(run_ranks(2, save_some, root, local, [1, 2, 3, 4, 5], 6 * MIB, None))

    for told in results:
        assert [raised for raised, _ in told] == [None] * 5
        assert [held for _, held in told] == [["1"], ["1", "2"], ["1", "2", "3"], ["3", "4"], ["3", "4", "5"]]
    assert committed(root) == [1, 2, 3, 4, 5]


def open_on_a_small_disk(rank, world, root, local, nbytes):
    model = Blob(nbytes)
    raised = raised_by(lambda: checkpointer(root, {"model": model}, local=local))
    again = raised_by(lambda: checkpointer(root, {"model": Blob(MIB)}, local=local).close())
    return raised, again


def test_a_disk_too_small_for_a_first_save_is_refused_before_the_first_step_on_all_ranks(tmp_path, disk):
    root, local = tmp_path / "run", disk("nvme", 4 * MIB)

    for raised, again in values(run_ranks(2, open_on_a_small_disk, root, local, 6 * MIB)):
        assert raised.type == "RootError"
        assert "ranks (0, 1) need 6.0 MiB" in raised.text
        assert "4.0 MiB free" in raised.text
        assert again is None


def save_on_two_disks(rank, world, root, locals_, nbytes):
    ckpt = checkpointer(root, {"model": Blob(nbytes)}, local=locals_[rank], save_last=False)
    if rank == 1:
        fill_up(locals_[1])
    dist.barrier()
    raised = attempt(ckpt, 1)
    assert raised_by(ckpt.close).text == raised.text
    return raised


def test_only_the_disk_that_is_short_is_named(tmp_path, disk):
    root, locals_ = tmp_path / "run", [disk("nvme0", 20 * MIB), disk("nvme1", 20 * MIB)]

    for raised in values(run_ranks(2, save_on_two_disks, root, locals_, 6 * MIB)):
        (failure,) = raised["failures"]
        assert failure["rank"] == 1
        assert str(locals_[1]) in failure["text"]
        assert "ranks (1,) need 3.0 MiB" in failure["text"]
        assert str(locals_[0]) not in raised.text
    assert dcpsvc.list_checkpoints(root) == []


# --- the folder of PEFT beside a shard ----------------------------------------------------------------


class Config:
    """As PEFT's is, as far as a checkpoint looks."""

    def to_dict(self):
        return {"peft_type": "LORA"}


class Adapter(torch.nn.Module):
    """As PEFT leaves one, of as many bytes as it is told."""

    def __init__(self, nbytes):
        super().__init__()
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(1024, nbytes // 4096, bias=False)})
        self.peft_config = {"default": Config()}


def save_with_a_folder(rank, world, root, local, nbytes):
    """What the first save raised beside a filler, what it left on the disk; what one without a filler raised."""
    with checkpointer(root, {"model": Adapter(nbytes)}, local=local, adapter_folder="model") as ckpt:
        if rank == 0:
            (local / "filler").write_bytes(bytes(10 * MIB))
        dist.barrier()
        raised, left = attempt(ckpt, 1), step_files(local, 1)
        dist.barrier()
        if rank == 0:
            (local / "filler").unlink()
        dist.barrier()
        return raised, left, attempt(ckpt, 2)


def test_a_disk_with_room_for_all_shards_but_not_for_the_folder_too_refuses_the_save_before_a_byte(tmp_path, disk):
    root, local = tmp_path / "run", disk("nvme", 20 * MIB)

    for raised, left, later in values(run_ranks(2, save_with_a_folder, root, local, 6 * MIB)):
        (failure,) = raised["failures"]
        assert (failure["phase"], failure["error"]) == ("plan", "StoreFullError")
        assert f"{local}" in failure["text"]
        assert "ranks (0, 1) need 12.0 MiB, 6.0 MiB of it for the adapter folder: 2." in failure["text"]
        assert left == []
        assert later is None
    assert committed(root) == [2]


def open_with_a_folder(rank, world, root, locals_, nbytes):
    def opened():
        return checkpointer(root, {"model": Adapter(nbytes)}, local=locals_[rank], adapter_folder="model")

    return raised_by(opened)


def test_the_disk_of_rank_0_alone_must_have_room_for_the_folder_and_that_is_said_before_the_first_step(tmp_path, disk):
    root, locals_ = tmp_path / "run", [disk("nvme0", 8 * MIB), disk("nvme1", 4 * MIB)]

    for raised in values(run_ranks(2, open_with_a_folder, root, locals_, 6 * MIB)):
        assert raised.type == "RootError"
        assert "8.0 MiB free and ranks (0,) need 9.0 MiB, 6.0 MiB of it for the adapter folder: 1.0 MiB" in raised.text
        assert str(locals_[1]) not in raised.text.partition(": ")[2]
