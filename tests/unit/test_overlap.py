"""Training goes on while large tensors are copied: a checkpoint holds the state as of ``save()``, or it fails."""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from dcpsvc import Checkpointer, copying
from dcpsvc.errors import ConfigError, SaveFailedError
from tests.unit.one_process import resume, told
from tests.unit.training import Container

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SECONDS = 30
WIDTH = 300
"""Its weights are large, its biases are not."""


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.second = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.table.mul_(0.9)
        return self.second(self.norm(self.first(x)))


def state_of(seed: int, make: Callable[[nn.Module], torch.optim.Optimizer] | None = None) -> dict[str, Any]:
    model = Net(seed)
    return {"model": model, "optim": (make or adam)(model)}


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def train(state: dict[str, Any], steps: int = 1) -> None:
    for _ in range(steps):
        state["model"](torch.randn(8, WIDTH)).square().mean().backward()
        state["optim"].step()
        state["optim"].zero_grad()


def contents(state: dict[str, Any]) -> Any:
    return told([state["model"].state_dict(), state["optim"].state_dict()])


def checkpointer(folder: Path, state: dict[str, Any], **options: Any) -> Checkpointer:
    return Checkpointer(folder / "root", state, local=folder / "local", save_last=False, **options)


class Held(copying.Batch):
    """What an optimizer owns is copied when it may be, by the thread that copies: training comes too late to help."""

    free = threading.Event()

    def run(self) -> None:
        if self.owner is not None and threading.current_thread() is not threading.main_thread():
            assert self.free.wait(SECONDS)
        super().run()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    monkeypatch.setattr(copying, "Batch", Held)
    Held.free = threading.Event()
    yield Held.free
    Held.free.set()


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": adam,
    "adamw, fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
    "adamw, one by one": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "two groups": lambda model: torch.optim.AdamW([{"params": [p], "lr": 0.1} for p in model.parameters()]),
    "two in a container": lambda model: Container([model.first, model.second]),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("staging", ["overlap", "block"])
def test_what_training_does_right_after_save_is_not_in_the_checkpoint(
    tmp_path: Path, make: Callable[[nn.Module], torch.optim.Optimizer], staging: str
) -> None:
    state = state_of(1, make)
    train(state, 2)
    before = []
    with checkpointer(tmp_path, state, staging=staging) as ckpt:
        for step in range(1, 6):
            before.append(contents(state))
            ckpt.save(step)
            train(state, 2)
    for step, content in enumerate(before, 1):
        other = state_of(2, make)
        assert resume(tmp_path, other, step=step) == step
        assert contents(other) == content


def test_training_runs_while_the_copy_waits_and_the_optimizer_waits_for_it(
    tmp_path: Path, held: threading.Event
) -> None:
    state = state_of(1)
    train(state)
    before = contents(state)
    with checkpointer(tmp_path, state) as ckpt:
        pending = ckpt.save(1)
        assert not pending.staged.done()
        state["model"](torch.randn(8, WIDTH)).square().mean().backward()  # writes to buffers: those were copied
        released = threading.Timer(0.2, held.set)
        released.start()
        state["optim"].step()
        assert held.is_set()  # one batch was in the hands of the other thread
        pending.wait(SECONDS)
        assert pending.timings.held_s > 0
        assert ckpt.statistics().blocked_s >= pending.timings.held_s
    other = state_of(2)
    resume(tmp_path, other)
    assert contents(other) == before


def test_with_block_nothing_is_left_to_wait_for(tmp_path: Path) -> None:
    state = state_of(1)
    train(state)
    with checkpointer(tmp_path, state, staging="block") as ckpt:
        for step in range(1, 20):
            assert ckpt.save(step).staged.done()
            state["model"].first.weight.data.add_(1.0)
        ckpt.wait(SECONDS)


def test_what_no_optimizer_of_the_state_owns_is_copied_before_save_returns(tmp_path: Path) -> None:
    model = Net(1)
    average = torch.optim.swa_utils.AveragedModel(model)
    before = told([model.state_dict(), average.state_dict()])
    with checkpointer(tmp_path, {"model": model, "average": average}) as ckpt:
        pending = ckpt.save(1)
        assert pending.staged.done()
        with torch.no_grad():
            model.first.weight.fill_(0.0)
        average.update_parameters(model)
    other = Net(2)
    found = {"model": other, "average": torch.optim.swa_utils.AveragedModel(other)}
    resume(tmp_path, found)
    assert told([other.state_dict(), found["average"].state_dict()]) == before


def test_a_parameter_of_two_optimizers_waits_for_neither(tmp_path: Path, held: threading.Event) -> None:
    model = Net(1)
    held.set()
    one, two = torch.optim.SGD([model.first.weight], lr=0.1), torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "one": one, "two": two}
    before = told(model.first.weight)
    with checkpointer(tmp_path, state) as ckpt:
        pending = ckpt.save(1)
        model(torch.randn(8, WIDTH)).square().mean().backward()
        one.step()
        two.step()
        pending.wait(SECONDS)
    other = Net(2)
    resume(tmp_path, {"model": other}, skip=[])
    assert told(other.first.weight) == before


def test_each_of_two_optimizers_waits_for_its_own(tmp_path: Path, held: threading.Event) -> None:
    model = Net(1)
    own = {name: torch.optim.SGD(getattr(model, name).parameters(), lr=0.1) for name in ("first", "second")}
    before = told(model.state_dict())
    with checkpointer(tmp_path, {"model": model, **own}) as ckpt:
        pending = ckpt.save(1)
        model(torch.randn(8, WIDTH)).square().mean().backward()
        own["second"].step()  # the other thread is at the first one's, and is held up
        assert not pending.staged.done()
        held.set()
        own["first"].step()
        pending.wait(SECONDS)
    other = Net(2)
    resume(tmp_path, {"model": other})
    trained = ("norm.num_batches_tracked", "norm.running_mean", "norm.running_var", "table")
    assert told(other.state_dict()) == before, trained


def changed_in_place(state: dict[str, Any]) -> None:
    with torch.no_grad():
        state["model"].first.weight.mul_(0.5)


def changed_behind_the_counter(state: dict[str, Any]) -> None:
    state["model"].first.weight.data.mul_(0.5)


def changed_by_a_second_optimizer(state: dict[str, Any]) -> None:
    state["model"].first.weight.grad = torch.ones(WIDTH, WIDTH)
    torch.optim.AdamW([state["model"].first.weight], lr=0.1, fused=True).step()


def loaded(state: dict[str, Any]) -> None:
    state["model"].load_state_dict(Net(5).state_dict())


@pytest.mark.parametrize(
    "change", [changed_in_place, changed_behind_the_counter, changed_by_a_second_optimizer, loaded]
)
def test_a_tensor_changed_behind_its_optimizer_costs_that_save_and_the_next_ones_are_whole(
    tmp_path: Path, held: threading.Event, caplog: pytest.LogCaptureFixture, change: Callable[[dict[str, Any]], None]
) -> None:
    state = state_of(1)
    train(state)
    with checkpointer(tmp_path, state) as ckpt, caplog.at_level(logging.WARNING, "dcpsvc"):
        pending = ckpt.save(1)
        change(state)
        held.set()
        with pytest.raises(SaveFailedError) as caught:
            pending.wait(SECONDS)
        (failure,) = caught.value.failures
        assert failure.error == "TornSnapshotError"
        assert "model." in failure.text
        assert 'staging="block"' in failure.text
        train(state)
        for step in (2, 3):
            before = contents(state)
            pending = ckpt.save(step)
            assert pending.staged.done()
            change(state)
            pending.wait(SECONDS)
        said = [record.getMessage() for record in caplog.records if "save() returns when all is copied" in record.msg]
        assert len(said) == 1
        assert ckpt.statistics().committed == 2
    other = state_of(2)
    assert resume(tmp_path, other) == 3
    assert contents(other) == before


def test_with_verify_staging_a_single_element_behind_the_counter_fails_the_save(
    tmp_path: Path, held: threading.Event
) -> None:
    state = state_of(1)
    with checkpointer(tmp_path, state, verify_staging=True) as ckpt:
        ckpt.save(1)
        held.set()
        ckpt.wait(SECONDS)
        held.clear()
        pending = ckpt.save(2)
        state["model"].first.weight.data[3, 5] += 1.0
        held.set()
        with pytest.raises(SaveFailedError, match="TornSnapshotError"):
            pending.wait(SECONDS)
        ckpt.save(3).wait(SECONDS)


def test_whoever_waits_for_staged_may_change_everything(tmp_path: Path) -> None:
    state = state_of(1)
    train(state)
    before = contents(state)
    with checkpointer(tmp_path, state) as ckpt:
        pending = ckpt.save(1)
        pending.staged.result(SECONDS)
        loaded(state)
        pending.wait(SECONDS)
    other = state_of(2)
    resume(tmp_path, other)
    assert contents(other) == before


def test_resume_waits_for_the_copy(tmp_path: Path) -> None:
    state = state_of(1)
    train(state)
    with checkpointer(tmp_path, state) as ckpt:
        first = contents(state)
        ckpt.save(1).wait(SECONDS)
        train(state)
        second = contents(state)
        pending = ckpt.save(2)
        ckpt.resume(step=1)
        assert contents(state) == first
        pending.wait(SECONDS)
    other = state_of(2)
    assert resume(tmp_path, other, step=2) == 2
    assert contents(other) == second


def test_a_resized_parameter_and_new_optimizer_state_are_saved_as_they_are(tmp_path: Path) -> None:
    state = state_of(1)
    train(state)
    with checkpointer(tmp_path, state) as ckpt:
        ckpt.save(1)
        with torch.no_grad():
            state["model"].second.weight.set_(torch.randn(WIDTH, WIDTH))
        state["model"].second = nn.Linear(WIDTH, WIDTH // 2)
        state["optim"] = adam(state["model"])
        train(state)
        before = contents(state)
        ckpt.save(2)
        train(state)
    other = state_of(2)
    other["model"].second = nn.Linear(WIDTH, WIDTH // 2)
    other["optim"] = adam(other["model"])
    assert resume(tmp_path, other, step=2) == 2
    assert contents(other) == before


def test_a_compiled_step_waits_too(tmp_path: Path, held: threading.Event) -> None:
    state = state_of(1)
    train(state)
    step = torch.compile(state["optim"].step, backend="eager")
    before = contents(state)
    with checkpointer(tmp_path, state) as ckpt:
        pending = ckpt.save(1)
        state["model"](torch.randn(8, WIDTH)).square().mean().backward()
        threading.Timer(0.1, held.set).start()
        step()
        assert pending.staged.done()
        pending.wait(SECONDS)
    other = state_of(2)
    resume(tmp_path, other)
    assert contents(other) == before


def test_nothing_of_the_state_is_held_once_it_is_written_and_closing_leaves_the_optimizer_alone(
    tmp_path: Path,
) -> None:
    state = state_of(1)
    train(state)
    with checkpointer(tmp_path, state) as ckpt:
        ckpt.save(1).wait(SECONDS)
        old = weakref.ref(state["model"].first.weight.untyped_storage())
        state["model"].first.weight.data = torch.zeros(WIDTH, WIDTH)
        gc.collect()
        assert old() is None
    assert not state["optim"]._optimizer_step_pre_hooks


def test_another_way_of_staging_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="staging='later' must be 'overlap' or 'block'"):
        checkpointer(tmp_path, state_of(1), staging="later")


def test_a_forked_child_that_steps_an_optimizer_waits_for_nobody(tmp_path: Path, held: threading.Event) -> None:
    state = state_of(1)
    train(state)
    with checkpointer(tmp_path, state) as ckpt:
        pending = ckpt.save(1)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # the others did not come along
            state["optim"].step()
            os._exit(7)
        assert os.waitstatus_to_exitcode(ended_within(child, SECONDS)) == 7
        held.set()
        pending.wait(SECONDS)


def ended_within(child: int, seconds: float) -> int:
    """Its status; it is killed if it does not end."""
    descriptor = os.pidfd_open(child)
    try:
        if not select.select([descriptor], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]
    finally:
        os.close(descriptor)


def test_an_optimizer_that_is_replaced_while_its_state_is_copied_leaves_a_whole_checkpoint(
    tmp_path: Path, held: threading.Event
) -> None:
    state = state_of(1)
    train(state)
    with checkpointer(tmp_path, state, max_inflight=2) as ckpt:
        before = contents(state)
        first = ckpt.save(1)
        threading.Timer(0.1, held.set).start()
        old, state["optim"] = state["optim"], adam(state["model"])
        second = ckpt.save(2)
        assert first.staged.done()
        state["model"](torch.randn(8, WIDTH)).square().mean().backward()
        old.step()  # nobody watches it any more
        first.wait(SECONDS)
        second.committed.exception(SECONDS)
        ckpt._uploader.last_error = None
    other = state_of(2)
    assert resume(tmp_path, other, step=1) == 1
    assert contents(other) == before
