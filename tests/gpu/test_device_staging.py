"""R10 on an accelerator: a snapshot is of one moment, and neither host nor device wait for it. Skipped without one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from dcpsvc import Checkpointer, copying
from dcpsvc.arena import Arena
from dcpsvc.arenas import Arenas
from dcpsvc.devicecopy import Devices
from dcpsvc.outline import Large
from dcpsvc.stages.stage import Snapshot
from dcpsvc.state.replicas import DeviceHashing
from tests.unit.one_process import bits, resume
from tests.unit.test_staging import outline_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]

SECONDS = 60
WIDTH = 4096
BUSY_CYCLES = 1_000_000_000
"""About half a second of a device."""


def state_of(seed: int, **options: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)).cuda()
    return {"model": model, "optim": torch.optim.AdamW(model.parameters(), lr=0.1, **options)}


def train(state: dict[str, Any]) -> None:
    state["model"](torch.randn(8, WIDTH, device="cuda")).square().mean().backward()
    state["optim"].step()
    state["optim"].zero_grad()


def copied(state: dict[str, Any]) -> list[bytes]:
    """Of everything, fetched by torch."""
    moments = [value for entry in state["optim"].state.values() for value in entry.values()]
    return [bits(tensor.cpu()) for tensor in (*state["model"].state_dict().values(), *moments)]


def checkpointer(folder: Path, state: dict[str, Any], **options: Any) -> Checkpointer:
    return Checkpointer(folder / "root", state, local=folder / "local", save_last=False, **options)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}, {"capturable": True}])
@pytest.mark.parametrize("staging", ["overlap", "block"])
def test_what_a_step_right_after_save_changes_is_not_in_the_checkpoint(
    tmp_path: Path, options: dict[str, bool], staging: str
) -> None:
    state, before = state_of(1, **options), []
    train(state)
    with checkpointer(tmp_path, state, staging=staging) as ckpt:
        for step in range(1, 4):
            before.append(copied(state))
            ckpt.save(step)
            train(state)
    for step, content in enumerate(before, 1):
        other = state_of(2, **options)
        resume(tmp_path, other, step=step)
        assert copied(other) == content


def test_save_returns_while_the_device_is_still_busy_with_what_came_before(tmp_path: Path) -> None:
    state = state_of(1)
    train(state)
    with checkpointer(tmp_path, state) as ckpt:
        ckpt.save(1).wait(SECONDS)  # memory and pinning are paid for
        torch.cuda._sleep(BUSY_CYCLES)
        busy = torch.cuda.current_stream().record_event()
        pending = ckpt.save(2)
        assert not busy.query()
        assert not pending.staged.done()
        pending.wait(SECONDS)


def test_saving_takes_no_memory_of_the_device(tmp_path: Path) -> None:
    state = state_of(1)
    train(state)
    with checkpointer(tmp_path, state) as ckpt:
        ckpt.save(1).wait(SECONDS)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ckpt.save(2).wait(SECONDS)
        assert torch.cuda.max_memory_allocated() == before
        assert torch.cuda.memory_allocated() == before


def test_an_arena_is_pinned_when_it_is_made_and_when_it_has_grown() -> None:
    arenas = Arenas(None, 1, lambda: None)
    arenas.device = torch.device("cuda", torch.cuda.current_device())
    for nbytes in (64 << 20, 65 << 20):
        arena = arenas.take(nbytes)
        assert isinstance(arena, Arena)
        assert arena.reserve(nbytes)[:4096].is_pinned()
        assert arena.reserve(nbytes)[-4096:].is_pinned()
    arena.release()


def test_a_graph_that_is_replayed_after_save_returned_does_not_get_into_the_checkpoint() -> None:
    """Of tensors without an owner, as those of a capturable optimizer are."""
    weight = torch.zeros(WIDTH, WIDTH, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight.add_(1)
    graph.replay()
    before = weight.cpu()
    outline = outline_of({"w": weight})
    outline.large = [Large(0, weight, None)]
    arena = Arena()
    arena.reserve(outline.nbytes)
    arena.pin(weight.device)
    staged = Snapshot(outline, arena, copying.thread(), devices=Devices())
    staged.stage()
    staged.copying.release(None)
    graph.replay()
    staged.copying.wait()
    assert torch.equal(staged.piece("w"), before)
    torch.cuda.synchronize()
    arena.release()


def test_replicas_are_hashed_without_the_host_waiting() -> None:
    tensors = {name: torch.randn(WIDTH, device="cuda") for name in "abc"}
    torch.cuda._sleep(BUSY_CYCLES)
    busy = torch.cuda.current_stream().record_event()
    found = DeviceHashing(tensors)
    assert not busy.query()
    found.run()
    assert found.hashes == {k: int(torch.hash_tensor(tensor.cpu())) for k, tensor in tensors.items()}
