"""The memory of the first save is there before it: made in the background, as soon as its size can be known."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from dcpsvc import Checkpointer, Every
from dcpsvc.errors import ClosedError
from tests.unit.one_process import told

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 2**20
SECONDS = 30


def state_of(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(600, 600)
    return {"model": model, "optim": torch.optim.AdamW(model.parameters()), "counter": {"x": seed, "t": torch.ones(3)}}


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    shared_memory = "/dev/shm"  # noqa: S108 - where every Linux has one
    if f"{shared_memory} tmpfs" not in Path("/proc/mounts").read_text():
        pytest.skip("there is no tmpfs here")
    with tempfile.TemporaryDirectory(dir=shared_memory) as folder:
        yield Path(folder)


def train(state: dict[str, Any]) -> None:
    for parameter in state["model"].parameters():
        parameter.grad = torch.ones_like(parameter)
    state["optim"].step()


def checkpointer(folder: Path, state: dict[str, Any], **options: Any) -> Checkpointer:
    return Checkpointer(folder / "root", state, **({"local": folder / "local", "save_last": False} | options))


def prepared_nbytes(ckpt: Checkpointer) -> int:
    ckpt._saver._staging.arenas.settle()
    return ckpt._saver._staging.arenas.nbytes


def assert_the_first_save_finds_it(ckpt: Checkpointer, step: int) -> None:
    """It takes the arena that is there, as it is, and the plan."""
    saver = ckpt._saver
    (arena,), made = list(saver._staging.arenas._arenas), saver._blueprints.made
    begins = arena.reserve(1).data_ptr()
    pending = ckpt.save(step)
    pending.wait(SECONDS)
    assert saver._staging.arenas._arenas == [arena]
    assert arena.reserve(1).data_ptr() == begins
    assert pending.timings.shard_nbytes - MIB < arena.nbytes < pending.timings.shard_nbytes + MIB
    assert saver._blueprints.made == made


def test_a_fresh_run_is_ready_after_its_first_step_when_the_optimizer_has_its_state(tmp_path: Path) -> None:
    state = state_of()
    with checkpointer(tmp_path, state) as ckpt:
        assert ckpt.resume() == 0
        assert prepared_nbytes(ckpt) == 0
        train(state)
        ckpt.step(1)
        assert prepared_nbytes(ckpt) > 3 * sum(p.nbytes for p in state["model"].parameters())
        train(state)
        assert_the_first_save_finds_it(ckpt, 2)


def test_a_resumed_run_is_ready_after_resume_but_for_its_values(tmp_path: Path) -> None:
    state = state_of()
    train(state)
    with checkpointer(tmp_path, state) as ckpt:
        ckpt.save(1).wait(SECONDS)
    other = state_of(1)
    with checkpointer(tmp_path, other) as ckpt:
        assert ckpt.resume() == 1
        assert prepared_nbytes(ckpt) > 3 * sum(p.nbytes for p in other["model"].parameters())
        before = list(ckpt._saver._staging.arenas._arenas)
        ckpt.save(2).wait(SECONDS)
        assert ckpt._saver._staging.arenas._arenas == before


def test_a_model_alone_is_ready_after_resume(tmp_path: Path) -> None:
    with checkpointer(tmp_path, {"model": nn.Linear(600, 600)}) as ckpt:
        ckpt.resume()
        assert prepared_nbytes(ckpt) > 0
        assert_the_first_save_finds_it(ckpt, 1)


def test_a_loop_that_saves_by_itself_may_ask_for_it(tmp_path: Path) -> None:
    state = state_of()
    train(state)
    with checkpointer(tmp_path, state) as ckpt:
        ckpt.prepare()
        assert prepared_nbytes(ckpt) > 0
        assert_the_first_save_finds_it(ckpt, 1)


def test_what_was_noted_of_the_last_step_is_as_it_was(tmp_path: Path) -> None:
    state = state_of()
    with checkpointer(tmp_path, state) as ckpt:
        train(state)
        ckpt.step(1)
        assert prepared_nbytes(ckpt) > 0
        assert ckpt._last.values is not None
        assert list(ckpt._last.values.items) == ["counter.t"]
        assert list(ckpt._last.values.documents) == ["counter"]


def test_a_state_that_changes_after_it_was_prepared_for_is_saved_as_it_is(tmp_path: Path) -> None:
    state: dict[str, Any] = {"values": torch.arange(1000)}
    with checkpointer(tmp_path, state) as ckpt:
        ckpt.prepare()
        state["values"] = torch.arange(5000.0)
        ckpt.save(1).wait(SECONDS)
    found: dict[str, Any] = {"values": torch.zeros(5000)}
    with checkpointer(tmp_path, found) as ckpt:
        assert ckpt.resume() == 1
    assert told(found["values"]) == told(state["values"])


def test_a_save_that_comes_at_once_waits_for_what_is_being_prepared(tmp_path: Path) -> None:
    state = state_of()
    train(state)
    with checkpointer(tmp_path, state) as ckpt:
        ckpt.prepare()
        ckpt.save(1).wait(SECONDS)
        assert len(ckpt._saver._staging.arenas._arenas) == 1


def test_nothing_is_prepared_where_there_is_no_room_for_a_copy(tmp_path: Path) -> None:
    with checkpointer(tmp_path, {"model": nn.Linear(600, 600)}, staging_nbytes=1) as ckpt:
        ckpt.resume()
        assert prepared_nbytes(ckpt) == 0
        ckpt.save(1).wait(SECONDS)


def test_a_state_that_cannot_be_read_yet_is_no_reason_to_fail(tmp_path: Path) -> None:
    with checkpointer(tmp_path, {"model": nn.Linear(2, 2, device="meta")}) as ckpt:
        ckpt.prepare()
        assert prepared_nbytes(ckpt) == 0


def test_closing_leaves_no_thread_and_afterwards_nothing_can_be_prepared(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path, {"model": nn.Linear(600, 600)})
    ckpt.prepare()
    ckpt.close()
    assert "dcpsvc-prepare" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(ClosedError):
        ckpt.prepare()


def test_a_tmpfs_is_a_local_tier_like_any_other(tmp_path: Path, tmpfs: Path) -> None:
    state, other = state_of(1), state_of(2)
    with checkpointer(tmp_path, state, local=tmpfs / "local", every=Every(steps=1)) as ckpt:
        ckpt.resume()
        for step in (1, 2, 3):
            train(state)
            ckpt.step(step)
    with checkpointer(tmp_path, other, local=tmpfs / "local") as ckpt:
        assert ckpt.resume() == 3
    assert told(other["model"].state_dict()) == told(state["model"].state_dict())
    assert len(list((tmpfs / "local").rglob("*.safetensors"))) == 2
