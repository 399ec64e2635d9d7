"""R1 R5 R25 and laws L3, L5: what is wrong from the start is said on every rank, before the first step."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dcpsvc
from tests.ranks.harness import raised_by, run_ranks, values
from tests.ranks.models import Training, checkpointer, committed


def open_here(rank, world, roots, locals_=None):
    """Open a Checkpointer, each rank at its own place; what that raises."""
    training = Training("plain", rank)
    root = roots[rank % len(roots)]
    local = locals_[rank % len(locals_)] if locals_ else None
    return raised_by(lambda: checkpointer(root, training.state, local=local).close())


def test_a_root_below_a_regular_file_is_refused_on_every_rank(tmp_path):
    (tmp_path / "file").write_text("mine")

    for error in values(run_ranks(3, open_here, [tmp_path / "file" / "run"])):
        assert error.type == "RootError"
        assert str(tmp_path / "file" / "run") in error.text
    assert (tmp_path / "file").read_text() == "mine"


def test_a_local_tier_that_one_rank_cannot_write_is_refused_on_every_rank(tmp_path):
    (tmp_path / "file").touch()
    places = [tmp_path / "local", tmp_path / "file" / "local"]

    for error in values(run_ranks(2, open_here, [tmp_path / "run"], places)):
        assert error.type == "RootError"
        assert "rank 1" in error.text


def test_a_root_that_is_another_place_on_one_rank_is_refused_on_every_rank(tmp_path):
    roots = [tmp_path / "run", tmp_path / "run", tmp_path / "elsewhere"]

    for error in values(run_ranks(3, open_here, roots)):
        assert error.type == "RootError"
        assert "rank 2" in error.text
        assert "not the same place" in error.text


def test_two_roots_that_both_hold_runs_are_told_apart(tmp_path):
    for name in ("one", "two"):
        assert values(run_ranks(1, open_here, [tmp_path / name])) == [None]

    for error in values(run_ranks(2, open_here, [tmp_path / "one", tmp_path / "two"])):
        assert error.type == "RootError"
        assert "not the same place" in error.text


def test_a_root_of_another_format_version_is_refused_on_every_rank(tmp_path):
    root = tmp_path / "run"
    assert values(run_ranks(1, open_here, [root])) == [None]
    content = json.loads((root / "run.json").read_text())
    (root / "run.json").write_text(json.dumps(content | {"format": 99}))

    for error in values(run_ranks(2, open_here, [root])):
        assert error.type == "UnsupportedFormatError"
        assert "99" in error.text
    assert raised_by(dcpsvc.list_checkpoints, root).type == "UnsupportedFormatError"


def test_a_run_json_of_somebody_else_is_refused_and_left_alone(tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    (root / "run.json").write_text("not ours")

    for error in values(run_ranks(2, open_here, [root])):
        assert error.type == "RootError"
        assert "run.json" in error.text
    assert (root / "run.json").read_text() == "not ours"


def open_twice(rank, world, root):
    training = Training("plain", rank)
    with checkpointer(root, training.state, save_last=False) as ckpt:
        ckpt.save(1).wait()
        second = raised_by(checkpointer, root, training.state)
        dist.barrier()
        ckpt.save(2).wait()
    third = raised_by(lambda: checkpointer(root, training.state).close())
    return second, third


def test_a_second_job_on_a_live_run_is_refused_on_every_rank_and_the_first_goes_on(tmp_path):
    root = tmp_path / "run"

    for second, third in values(run_ranks(2, open_twice, root)):
        assert second.type == "RunBusyError"
        assert "process" in second.text
        assert third is None
    assert committed(root) == [1, 2]


def save_beside_foreign_files(rank, world, root):
    training = Training("plain", rank)
    with checkpointer(root, training.state, keep=dcpsvc.Latest(1)) as ckpt:
        start = ckpt.resume()
        for step in (1, 2):
            ckpt.save(step).wait()
    return start


def test_foreign_files_are_ignored_and_survive(tmp_path):
    root = tmp_path / "run"
    foreign = [
        "notes.txt",
        "data/notes.txt",
        "data/step-9/x.bin",
        "manifests/step-9.json",
        "layouts/x",
        "pytorch_model.bin",
    ]
    for name in foreign:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")

    assert values(run_ranks(2, save_beside_foreign_files, root)) == [0, 0]

    assert committed(root) == [2]
    assert [(root / name).read_text() for name in foreign] == ["mine"] * len(foreign)


def misuse(rank, world, root):
    """Calls that make no sense, each on every rank."""
    training = Training("ddp", rank)
    ckpt = checkpointer(root, training.state)
    ckpt.save(1).wait()
    found = {
        "committed step": raised_by(ckpt.save, 1),
        "no step": raised_by(ckpt.save, "7"),
        "minus": raised_by(ckpt.save, -1),
    }
    training.trainer["callback"] = lambda: None
    found["object"] = raised_by(ckpt.save, 2)
    del training.trainer["callback"]
    training.core.register_buffer("sparse", torch.eye(3).to_sparse())
    found["sparse"] = raised_by(ckpt.save, 3)
    del training.core.sparse
    ckpt.save(4).wait()
    ckpt.close()
    ckpt.close()
    calls = {"save": (ckpt.save, 5), "step": (ckpt.step, 5), "resume": (ckpt.resume,), "stop": (ckpt.request_stop,)}
    return found | {name: raised_by(*call) for name, call in calls.items()}


def test_misuse_is_refused_with_a_typed_error_on_every_rank_and_breaks_nothing(tmp_path):
    root = tmp_path / "run"

    for found in values(run_ranks(2, misuse, root)):
        assert found["committed step"].type == "StepExistsError"
        assert found["committed step"]["step"] == 1
        assert {found[name].type for name in ("no step", "minus")} == {"ConfigError"}
        assert found["object"].type == "UnsupportedStateError"
        assert found["object"]["key"] == "trainer.callback"
        assert found["sparse"].type == "UnsupportedStateError"
        assert found["sparse"]["key"] == "model.sparse"
        assert {found[name].type for name in ("save", "step", "resume", "stop")} == {"ClosedError"}
    assert committed(root) == [1, 4]


@pytest.mark.parametrize("call", [dcpsvc.list_checkpoints, dcpsvc.latest, dcpsvc.storage_reader])
def test_a_place_without_a_run_is_an_error_and_is_not_made(tmp_path, call):
    error = raised_by(call, tmp_path / "no run")

    assert error.type == "NoRunError"
    assert not Path(tmp_path / "no run").exists()
