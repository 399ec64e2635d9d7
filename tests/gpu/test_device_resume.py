"""R9 R30 on an accelerator: what is resumed there is what was saved, where it was, by way of little host memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dcpsvc
from tests.gpu.test_device_staging import BUSY_CYCLES, WIDTH, checkpointer, copied, state_of, train
from tests.unit.one_process import bits, resume

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]

MIB = 1 << 20


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one, for meshes."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensors_of(state: dict[str, Any]) -> list[torch.Tensor]:
    moments = [value for entry in state["optim"].state.values() for value in entry.values()]
    return [*state["model"].state_dict().values(), *moments]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}, {"capturable": True}])
def test_module_and_optimizer_are_resumed_exactly_where_they_are_and_go_on_alike(
    tmp_path: Path, options: dict[str, bool]
) -> None:
    state = state_of(1, **options)
    train(state)
    with checkpointer(tmp_path, state) as ckpt:
        ckpt.save(1).wait(60)
    other = state_of(2, **options)
    train(other)
    places = [tensor.data_ptr() for tensor in tensors_of(other) if tensor.is_cuda]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert resume(tmp_path, other) == 1
    largest_nbytes = max(tensor.nbytes for tensor in tensors_of(other))
    assert torch.cuda.max_memory_allocated() - before <= largest_nbytes + MIB
    assert copied(other) == copied(state)
    assert [tensor.data_ptr() for tensor in tensors_of(other) if tensor.is_cuda] == places
    assert [tensor.device for tensor in tensors_of(other)] == [tensor.device for tensor in tensors_of(state)]
    for each in (state, other):
        torch.manual_seed(7)
        train(each)
    assert copied(other) == copied(state)


def test_an_optimizer_that_has_not_begun_gets_its_moments_on_the_device(tmp_path: Path) -> None:
    state, other = state_of(1), state_of(2)
    train(state)
    with checkpointer(tmp_path, state) as ckpt:
        ckpt.save(1).wait(60)
    resume(tmp_path, other)
    assert copied(other) == copied(state)
    entries = other["optim"].state.values()
    assert {entry["exp_avg"].device.type for entry in entries} == {"cuda"}
    assert {entry["step"].device.type for entry in entries} == {"cpu"}  # as torch keeps them


def test_a_module_from_the_meta_device_is_filled_where_to_empty_has_put_it(tmp_path: Path) -> None:
    state = state_of(1)
    with checkpointer(tmp_path, {"model": state["model"]}) as ckpt:
        ckpt.save(1).wait(60)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
    model.to_empty(device="cuda")
    resume(tmp_path, {"model": model})
    wanted = state["model"].state_dict()
    for name, value in model.state_dict().items():
        assert value.device.type == "cuda"
        assert bits(value.cpu()) == bits(wanted[name].cpu()), name


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("meta", [False, True])
def test_dtensors_on_a_mesh_of_devices_are_filled_there_from_the_meta_device_too(tmp_path: Path, *, meta: bool) -> None:
    mesh = init_device_mesh("cuda", (1,))
    torch.manual_seed(1)
    saved = fully_shard(nn.Linear(WIDTH, WIDTH).cuda(), mesh=mesh)
    with checkpointer(tmp_path, {"model": saved}) as ckpt:
        ckpt.save(1).wait(60)
    with torch.device("meta" if meta else "cuda"):
        other = fully_shard(nn.Linear(WIDTH, WIDTH), mesh=mesh)
    resume(tmp_path, {"model": other})
    for name, parameter in other.named_parameters():
        here, there = (each.to_local() for each in (parameter, saved.get_parameter(name)))
        assert here.device.type == "cuda"
        assert bits(here.cpu()) == bits(there.cpu()), name
    other(torch.randn(2, WIDTH, device="cuda")).square().mean().backward()  # it can go on


def test_plain_dcp_load_fills_tensors_of_a_device_whatever_their_strides(tmp_path: Path) -> None:
    saved = torch.randn(3000, 1000, device="cuda")
    with checkpointer(tmp_path, {"w": saved}) as ckpt:
        ckpt.save(1).wait(60)
    target = torch.zeros(1000, 3000, device="cuda").T  # not contiguous
    dcp.load({"w": target}, storage_reader=dcpsvc.storage_reader(tmp_path / "root"), no_dist=True)
    assert torch.equal(target, saved)


def test_plain_dcp_load_comes_after_what_a_stream_of_the_caller_s_was_given(tmp_path: Path) -> None:
    saved = torch.randn(WIDTH, WIDTH, device="cuda")
    with checkpointer(tmp_path, {"w": saved}) as ckpt:
        ckpt.save(1).wait(60)
    with torch.cuda.stream(torch.cuda.Stream()):
        target = torch.empty(WIDTH, WIDTH, device="cuda")
        torch.cuda._sleep(BUSY_CYCLES)
        target.zero_()
        dcp.load({"w": target}, storage_reader=dcpsvc.storage_reader(tmp_path / "root"), no_dist=True)
    torch.cuda.synchronize()
    assert torch.equal(target, saved)


LIFE = """
import json, re, sys
from pathlib import Path
import torch, torch.distributed.checkpoint as dcp, dcpsvc

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

way, root, local = sys.argv[1:]
model = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, bias=False) for _ in range(8))).cuda()
for number, parameter in enumerate(model.parameters()):
    torch.nn.init.constant_(parameter, number + 1.0 if way == "save" else 0.0)
ckpt = dcpsvc.Checkpointer(root, {"model": model}, local=local, save_last=False, staging_nbytes=2**20)
grown = 0
with ckpt:
    if way == "save":
        ckpt.save(1).wait(60)
    else:
        torch.zeros(1 << 20).cuda()  # what the first copy costs
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
        before = status("VmRSS")
        if way == "resume":
            ckpt.resume()
        else:
            state = {"model": model.state_dict()}
            dcp.load(state, storage_reader=dcpsvc.storage_reader(root), no_dist=True)
        torch.cuda.synchronize()
        grown = status("VmHWM") - before
        assert all(bool((p == number + 1.0).all()) for number, p in enumerate(model.parameters()))
print(json.dumps(grown))
"""


@pytest.mark.timeout(200)
def test_of_512_mib_on_a_device_no_more_than_once_waits_on_the_host_and_of_plain_dcp_a_few_bands(
    tmp_path: Path,
) -> None:
    grown = {}
    for way in ("save", "resume", "dcp"):
        argv = [sys.executable, "-c", LIFE, way, str(tmp_path / "root"), str(tmp_path / "local")]
        done = subprocess.run(argv, timeout=55, check=True, capture_output=True, text=True)
        grown[way] = json.loads(done.stdout)
    assert grown["resume"] < (512 + 192) * MIB
    assert grown["dcp"] < 256 * MIB
