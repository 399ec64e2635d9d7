"""The ends of a run: what is abandoned is never committed, and the last step is saved exactly or not at all."""

from __future__ import annotations

import fcntl
import math
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import dcpsvc
from dcpsvc import Checkpointer, Every
from dcpsvc.errors import ConfigError, SaveFailedError, UnsupportedStateError, WaitTimeoutError
from dcpsvc.storage.posix import PosixStore
from tests.unit.one_process import bits

if TYPE_CHECKING:
    from collections.abc import Iterator

BOUND_S = 30.0


def checkpointer(folder: Path, state: dict[str, Any], **options: Any) -> Checkpointer:
    return Checkpointer(folder / "root", state, local=folder / "local", **options)


def committed(folder: Path) -> list[int]:
    return [found.step for found in dcpsvc.list_checkpoints(folder / "root") if found.state == "committed"]


def loaded(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    dcpsvc.load(folder / "root", state)
    return state


# --- abandoned saves --------------------------------------------------------------------------------


class Hanging(PosixStore):
    """An upload hangs until it is let go."""

    let_go: threading.Event
    reached: threading.Event

    def put_file(self, key: str, path: Path, **options: Any) -> None:
        self.reached.set()
        assert self.let_go.wait(BOUND_S)
        super().put_file(key, path, **options)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hanging]]:
    """The store that the next Checkpointer of this test gets."""
    kind = type("Hanging", (Hanging,), {"let_go": threading.Event(), "reached": threading.Event()})
    monkeypatch.setattr("dcpsvc.checkpointer.open_store", lambda root, _, **__: kind(Path(root)))
    yield kind
    kind.let_go.set()


def is_free(lock: Path) -> bool:
    """Whether another process could have this rank's place."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def wait_until_free(lock: Path) -> None:
    """Bounded by the test's own timeout."""
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def test_a_save_abandoned_by_close_is_not_committed_and_the_next_start_finishes_it(
    tmp_path: Path, hanging: type[Hanging], monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = checkpointer(tmp_path, {"x": torch.ones(2)}, save_last=False)
    (lock,) = (tmp_path / "local").glob("*/rank-00000.lock")
    pending = ckpt.save(1)
    assert hanging.reached.wait(BOUND_S)

    with pytest.raises(WaitTimeoutError) as caught:
        ckpt.close(timeout_s=0.01)
    assert caught.value.pending == ("step 1",)

    wait_until_free(lock)
    with pytest.raises(SaveFailedError, match="closed before the save ended"):
        pending.wait(BOUND_S)
    assert dcpsvc.list_checkpoints(tmp_path / "root") == []
    assert list((tmp_path / "local").rglob("*.safetensors"))
    hanging.let_go.set()

    monkeypatch.undo()
    with checkpointer(tmp_path, {"x": torch.zeros(2)}) as again:
        assert committed(tmp_path) == [1]
        assert again.resume() == 1
        assert torch.equal(again.state["x"], torch.ones(2))


def test_an_upload_that_hangs_longer_than_its_timeout_fails_its_save_and_training_goes_on(
    tmp_path: Path, hanging: type[Hanging]
) -> None:
    ckpt = checkpointer(tmp_path, {"x": torch.ones(2)}, save_last=False, upload_timeout_s=0.2)
    with pytest.raises(SaveFailedError, match=r"upload.*did not end within 0\.2 s"):
        ckpt.save(1).wait(BOUND_S)
    hanging.let_go.set()
    ckpt.save(2).wait(BOUND_S)
    ckpt.close()
    assert committed(tmp_path) == [2]


def test_a_closed_checkpointer_frees_its_place_and_a_second_close_does_nothing(tmp_path: Path) -> None:
    ckpt = checkpointer(tmp_path, {"x": torch.ones(2)})
    (lock,) = (tmp_path / "local").glob("*/rank-00000.lock")
    assert not is_free(lock)
    ckpt.close()
    ckpt.close()
    assert is_free(lock)


def test_a_forked_child_that_closes_its_copy_takes_nothing_from_the_parent(tmp_path: Path) -> None:
    with checkpointer(tmp_path, {"x": torch.ones(2)}) as ckpt:
        ckpt.step(1)
        if (child := os.fork()) == 0:
            code = 1
            try:
                ckpt.close()
                ckpt.close_at_exit()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert not committed(tmp_path)
        ckpt.save(2).wait(BOUND_S)
        ckpt.step(3)
    assert committed(tmp_path) == [2, 3]


# --- steps and metrics ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [7, 6, 0])
def test_a_step_that_does_not_grow_is_refused_and_the_last_one_is_saved(tmp_path: Path, step: int) -> None:
    with checkpointer(tmp_path, {"x": torch.ones(2)}) as ckpt:
        ckpt.step(7)
        with pytest.raises(ConfigError, match=f"step\\({step}\\) after step 7: steps must grow"):
            ckpt.step(step)
    assert committed(tmp_path) == [7]


def test_after_resume_steps_grow_from_the_one_resumed(tmp_path: Path) -> None:
    with checkpointer(tmp_path, {"x": torch.ones(2)}) as ckpt:
        ckpt.save(7)
    with checkpointer(tmp_path, {"x": torch.ones(2)}) as ckpt:
        assert ckpt.resume() == 7
        with pytest.raises(ConfigError, match="steps must grow"):
            ckpt.step(7)
        ckpt.step(8)
    assert committed(tmp_path) == [7, 8]


@pytest.mark.parametrize("step", [-1, 10**12, 1.5, True, "3", None])
def test_a_step_that_is_no_step_is_refused(tmp_path: Path, step: Any) -> None:
    with checkpointer(tmp_path, {"x": torch.ones(2)}) as ckpt:
        for call in (ckpt.step, ckpt.save):
            with pytest.raises(ConfigError):
                call(step)


NUMBERS = {
    "loss": 0.5, "count": 3, "f4": np.float32(1.5), "tensor": torch.tensor(2.0), "nan": math.nan, "inf": -math.inf,
}  # fmt: skip
NO_NUMBERS = {
    "note": "hello", "none": None, "thing": object(), "vector": torch.ones(2), "list": [1], "array": np.ones(2),
}  # fmt: skip


@pytest.mark.parametrize("by", ["save", "step", "last step"])
def test_metrics_that_are_no_numbers_cost_no_checkpoint_and_the_others_are_recorded(tmp_path: Path, by: str) -> None:
    with checkpointer(tmp_path, {"x": torch.ones(2)}, every=Every(steps=1) if by == "step" else None) as ckpt:
        call = ckpt.save if by == "save" else ckpt.step
        call(1, metrics=NUMBERS | NO_NUMBERS)
    (found,) = dcpsvc.list_checkpoints(tmp_path / "root")
    assert found.state == "committed"
    assert found.metrics.keys() == NUMBERS.keys()
    assert math.isnan(found.metrics.pop("nan"))
    assert found.metrics == {name: float(value) for name, value in NUMBERS.items() if name != "nan"}


# --- the last step ----------------------------------------------------------------------------------


class Counter:
    """A Stateful that cannot always be asked."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.obstacle: Any = None

    def state_dict(self) -> dict[str, Any]:
        if isinstance(self.obstacle, Exception):
            raise self.obstacle
        return {"number": self.number} | ({} if self.obstacle is None else {"odd": self.obstacle})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


OBSTACLES = [RuntimeError("workers not started"), object()]


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=["raises", "unsupported"])
def test_values_that_cannot_be_collected_cost_no_step_that_is_not_saved(tmp_path: Path, obstacle: Any) -> None:
    counter = Counter(1)
    with checkpointer(tmp_path, {"x": torch.ones(2), "counter": counter}) as ckpt:
        counter.obstacle = obstacle
        assert not ckpt.step(1).saved
        counter.obstacle = None
        ckpt.step(2)
    assert committed(tmp_path) == [2]


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=["raises", "unsupported"])
def test_a_last_step_whose_values_could_not_be_collected_never_gets_those_of_the_step_before(
    tmp_path: Path, obstacle: Any
) -> None:
    counter = Counter(1)

    def train() -> None:
        with checkpointer(tmp_path, {"x": torch.ones(2), "counter": counter}) as ckpt:
            ckpt.step(1)
            counter.number, counter.obstacle = 2, obstacle
            ckpt.step(2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert dcpsvc.list_checkpoints(tmp_path / "root") == []


def test_a_last_step_whose_values_can_be_collected_at_the_close_is_saved_with_those(tmp_path: Path) -> None:
    counter = Counter(1)
    with checkpointer(tmp_path, {"counter": counter}) as ckpt:
        ckpt.step(1)
        counter.number, counter.obstacle = 2, object()
        ckpt.step(2)
        counter.obstacle = None
    assert committed(tmp_path) == [2]
    assert loaded(tmp_path, {"counter": Counter()})["counter"].number == 2


def test_a_last_step_whose_values_still_cannot_be_saved_at_the_close_is_an_error_by_key(tmp_path: Path) -> None:
    counter = Counter(1)
    ckpt = checkpointer(tmp_path, {"counter": counter})
    counter.obstacle = object()
    ckpt.step(1)
    with pytest.raises(UnsupportedStateError) as caught:
        ckpt.close()
    assert caught.value.key == "counter.odd"
    assert dcpsvc.list_checkpoints(tmp_path / "root") == []


def model_and_optimizer() -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.5)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("moves_on", [False, True])
def test_an_optimizer_that_was_replaced_is_watched_too(tmp_path: Path, moves_on: bool) -> None:  # noqa: FBT001
    model, optimizer = model_and_optimizer()
    state = {"model": model, "optim": optimizer}
    with checkpointer(tmp_path, state) as ckpt:
        state["optim"] = torch.optim.SGD(model.parameters(), lr=0.25)
        train(model, state["optim"])
        ckpt.step(1)
        weight = bits(model.weight)
        if moves_on:
            train(model, state["optim"])
    if moves_on:
        assert dcpsvc.list_checkpoints(tmp_path / "root") == []
    else:
        assert bits(loaded(tmp_path, {"model": nn.Linear(2, 2)})["model"].weight) == weight


def test_an_optimizer_that_left_the_state_is_no_obstacle_any_more(tmp_path: Path) -> None:
    model, old = model_and_optimizer()
    state = {"model": model, "optim": old}
    with checkpointer(tmp_path, state) as ckpt:
        ckpt.step(1)
        state["optim"] = torch.optim.SGD(model.parameters(), lr=0.25)
        ckpt.step(2)
        old.step()
    assert committed(tmp_path) == [2]


SMALL, LARGE = 1000, 2_000_000


def average_after_an_exception(folder: Path, numel: int) -> None:
    average = torch.zeros(numel)
    with checkpointer(folder, {"average": average}) as ckpt:
        average += 1
        ckpt.step(1)
        average += 1
        raise ZeroDivisionError


def test_small_values_are_saved_as_they_were_when_the_step_was_complete(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        average_after_an_exception(tmp_path, SMALL)
    assert torch.equal(loaded(tmp_path, {"average": torch.zeros(SMALL)})["average"], torch.ones(SMALL))


def test_large_values_that_have_moved_on_are_not_saved_as_those_of_the_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError):
        average_after_an_exception(tmp_path, LARGE)
    assert dcpsvc.list_checkpoints(tmp_path / "root") == []
    assert "the last step is not saved" in caplog.text


def test_large_values_are_not_copied_at_each_step(tmp_path: Path) -> None:
    copies: list[int] = []

    class Large(torch.Tensor):
        """Tells of every copy."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in {torch.Tensor.clone, torch.Tensor.copy_, torch.clone, torch.Tensor.cpu, torch.Tensor.to}:
                copies.append(args[0].numel())
            return super().__torch_function__(func, types, args, kwargs or {})

    for numel, copied in ((SMALL, True), (LARGE, False)):
        copies.clear()
        average = torch.zeros(numel).as_subclass(Large)
        with checkpointer(tmp_path / str(numel), {"average": average}) as ckpt:
            for step in range(1, 4):
                ckpt.step(step)
            assert bool(copies) == copied


def test_a_normal_close_saves_the_last_step_exactly_however_large_its_values_are(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    average = torch.zeros(LARGE)
    with checkpointer(tmp_path, {"model": model, "optim": optimizer, "average": average}) as ckpt:
        for step in range(1, 4):
            train(model, optimizer)
            average += 1
            ckpt.step(step)
    found = loaded(tmp_path, {"model": nn.Linear(2, 2), "average": torch.zeros(LARGE)})
    assert committed(tmp_path) == [3]
    assert torch.equal(found["average"], torch.full((LARGE,), 3.0))
    assert bits(found["model"].weight) == bits(model.weight)
