"""Copies from a device: in order with what training does there, the host does not wait, nothing torn goes through."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from dcpsvc import Checkpointer, copying
from dcpsvc.arena import Arena
from dcpsvc.errors import TornSnapshotError
from dcpsvc.outline import Large
from dcpsvc.stages.stage import Snapshot
from dcpsvc.state.optimview import owner_of
from dcpsvc.state.replicas import DeviceHashing
from dcpsvc.witness import Watch
from tests.unit.late_device import SECONDS, LateDevice, LateDevices, LateStream, PromptStream
from tests.unit.one_process import resume, told
from tests.unit.test_staging import outline_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COPIER = copying.thread()
ADAM, OTHER = 11, 12
NUMEL = 50_000


@pytest.fixture
def device() -> Iterator[LateDevice]:
    made = LateDevice()
    yield made
    made.end()


def tensors() -> dict[str, torch.Tensor]:
    """Large and small ones, and one with rows that lie apart."""
    torch.manual_seed(0)
    found = {"a": torch.randn(NUMEL), "b": torch.randn(NUMEL), "buffer": torch.randn(NUMEL), "small": torch.randn(3)}
    return found | {"turned": torch.randn(200, 300).t()}


def snapshot(state: dict[str, torch.Tensor], device: LateDevice, **options: Any) -> Snapshot:
    """``a`` is changed by one optimizer, ``b`` by another, and the rest by anybody."""
    outline = outline_of(state)
    owners = {"a": ADAM, "b": OTHER}
    outline.large = [
        Large(number, state[name], owners.get(name))
        for number, name in enumerate(outline.placement.names)
        if state[name].nbytes > 1000
    ]
    made = Snapshot(outline, Arena(), COPIER, devices=LateDevices(device), **options)
    made.stage()
    return made


def piece(staged: Snapshot, name: str) -> torch.Tensor:
    staged.copying.wait()
    return staged.piece(name)


def change(state: dict[str, torch.Tensor], name: str) -> Any:
    return lambda: state[name].fill_(-1)


def test_staging_does_not_wait_for_the_device_and_the_writer_does(device: LateDevice) -> None:
    staged = snapshot(tensors(), device)  # it returned, and the device has copied nothing
    staged.copying.release(None)
    staged.copying.release(ADAM)
    assert device.order == []
    assert not staged.ended
    written = threading.Thread(target=staged.copying.wait_below, args=(staged.nbytes,))
    written.start()
    written.join(0.1)
    assert written.is_alive()
    device.free.set()
    written.join(SECONDS)
    staged.copying.wait()
    assert {name: told(staged.piece(name)) for name in tensors()} == {k: told(t) for k, t in tensors().items()}
    assert staged.ended


def test_what_an_optimizer_changes_comes_after_the_copy_of_its_own_and_the_host_goes_on(device: LateDevice) -> None:
    state = tensors()
    staged = snapshot(state, device)
    staged.copying.release(None)
    staged.copying.release(ADAM)
    device.train("adam", change(state, "a"))
    device.free.set()
    assert torch.equal(piece(staged, "a"), tensors()["a"])
    device.current().end()
    assert device.order.index("adam") > 0
    assert float(state["a"][0]) == -1


def test_an_optimizer_does_not_wait_for_what_another_one_changes(device: LateDevice) -> None:
    state, turn = tensors(), threading.Event()
    device.at_most = 2  # what anybody may change, and what the first one does
    staged = snapshot(state, device)
    staged.copying.release(ADAM)
    device.train("adam", turn.set)
    device.free.set()
    assert turn.wait(SECONDS)
    staged.copying.release(OTHER)
    device.rest.set()
    device.train("other", change(state, "b"))
    assert torch.equal(piece(staged, "b"), tensors()["b"])


@pytest.mark.parametrize("name", ["buffer", "small", "turned"])
def test_what_anybody_may_change_is_ordered_when_save_returns(device: LateDevice, name: str) -> None:
    state = tensors()
    staged = snapshot(state, device)
    staged.copying.release(None)
    device.train("forward", change(state, name))
    device.free.set()
    assert torch.equal(piece(staged, name), tensors()[name])


def test_what_the_current_stream_was_given_before_is_in_the_copy(device: LateDevice) -> None:
    state, go = tensors(), threading.Event()
    device.current().do(lambda: go.wait(SECONDS))
    device.train("step before", lambda: state["a"].data.fill_(7))  # torch counts when it is asked, this runs later
    staged = snapshot(state, device)
    device.free.set()
    go.set()
    assert float(piece(staged, "a")[0]) == 7


def test_a_tensor_changed_before_its_optimizer_was_let_go_is_torn(device: LateDevice) -> None:
    state = tensors()
    staged = snapshot(state, device)
    with torch.no_grad():
        state["a"].add_(1)
    staged.copying.release(ADAM)
    device.free.set()
    with pytest.raises(TornSnapshotError, match="a"):
        staged.copying.wait()


def test_behind_the_counter_a_change_is_seen_by_who_looks_at_every_byte(device: LateDevice) -> None:
    state = tensors()
    staged = snapshot(state, device, watch=Watch.EVERY_BYTE)
    state["b"].data[17] = 3.0
    device.free.set()
    with pytest.raises(TornSnapshotError, match="b"):
        staged.copying.wait()


def test_looked_at_in_every_byte_what_was_not_changed_is_whole(device: LateDevice) -> None:
    staged = snapshot(tensors(), device, watch=Watch.EVERY_BYTE)
    device.free.set()
    staged.copying.wait()


def test_memory_that_the_device_still_writes_to_is_not_free_when_the_save_is_called_off(device: LateDevice) -> None:
    staged = snapshot(tensors(), device)
    staged.forget()
    assert staged.copying.error
    assert not staged.ended
    device.free.set()
    device.side.end()
    assert staged.copying._beside[0].idle


def test_with_block_the_host_waits_until_all_has_arrived(device: LateDevice) -> None:
    state = tensors()
    outline = outline_of(state)
    outline.large = [Large(number, state[name], None) for number, name in enumerate(outline.placement.names)]
    staged = Snapshot(outline, Arena(), COPIER, devices=LateDevices(device), waits=True)
    staged.stage()
    threading.Timer(0.05, device.free.set).start()
    staged.copying.release(None)
    assert device.free.is_set()
    assert staged.ended


def test_a_step_that_is_captured_orders_nothing_and_the_first_that_is_not_does(device: LateDevice) -> None:
    state = tensors()
    staged = snapshot(state, device)
    device.capturing = True
    staged.copying.release(ADAM)
    device.capturing = False
    staged.copying.release(ADAM)
    device.train("adam", change(state, "a"))
    device.free.set()
    assert torch.equal(piece(staged, "a"), tensors()["a"])


def test_an_optimizer_that_a_graph_may_step_is_waited_for_by_nobody_so_its_tensors_are_anybodys() -> None:
    weight = nn.Parameter(torch.zeros(3))
    assert owner_of(torch.optim.Adam([weight])) is not None
    assert owner_of(torch.optim.Adam([weight], capturable=True)) is None


def test_nothing_is_held_once_it_has_arrived(device: LateDevice) -> None:
    staged = snapshot(tensors(), device)
    device.free.set()
    staged.copying.wait()
    assert all(landing._held == [] for each in staged.copying._beside for landing in each.landings)


def test_a_device_that_does_not_get_there_is_given_up(device: LateDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcpsvc.state.replicas._PATIENCE_S", 0.01)
    staged = snapshot(tensors(), device)
    with pytest.raises(TimeoutError, match="device"):
        staged.copying.wait()


def test_on_a_device_the_hashes_of_many_tensors_come_in_one_transfer() -> None:
    found = DeviceHashing({"a": torch.ones(3), "b": torch.zeros(4, dtype=torch.int8)})
    assert found._sums.shape == (2,)
    found.run()
    assert found.hashes == {"a": int(torch.hash_tensor(torch.ones(3))), "b": 0}


# --- a whole job --------------------------------------------------------------------------------------


@pytest.mark.parametrize("staging", ["overlap", "block"])
def test_what_training_does_right_after_save_is_not_in_the_checkpoint(tmp_path: Path, staging: str) -> None:
    """Of tensors that a device copies late; the host is its current stream."""
    device = LateDevice(PromptStream())
    state, before = state_of(1), []
    options = {"staging": staging, "local": tmp_path / "local", "save_last": False}
    with Checkpointer(tmp_path / "root", state, **options) as ckpt:
        ckpt._saver._staging._devices = LateDevices(device, lambda tensor: tensor.numel() != 1)
        for step in range(1, 4):
            train(state)
            before.append(told(state["model"].state_dict() | state["optim"].state_dict()))
            threading.Timer(0.05, device.free.set).start()
            pending = ckpt.save(step)
            assert pending.staged.done() or staging == "overlap"
            train(state)
            pending.wait(SECONDS)
            device.free.clear()
    device.end()
    for step, content in enumerate(before, 1):
        other = state_of(2)
        assert resume(tmp_path, other, step=step) == step
        assert told(other["model"].state_dict() | other["optim"].state_dict()) == content


def state_of(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(200, 300), nn.BatchNorm1d(300), nn.Linear(300, 5))
    return {"model": model, "optim": torch.optim.AdamW(model.parameters(), lr=0.1)}


def train(state: dict[str, Any]) -> None:
    state["model"](torch.randn(8, 200)).square().mean().backward()
    state["optim"].step()
    state["optim"].zero_grad()


def test_a_stream_does_what_it_is_given_in_order_and_late() -> None:
    """The device of these tests is one."""
    first, second, done = LateStream(), LateStream(), list[str]()
    go = threading.Event()
    first.do(lambda: go.wait(SECONDS))
    first.do(lambda: done.append("first"))
    second.wait_event(first.record_event())
    second.do(lambda: done.append("second"))
    assert done == []
    go.set()
    second.end()
    first.end()
    assert done == ["first", "second"]
