"""Small training runs: plain, DDP and FSDP2, that compute the same thing every time."""

from __future__ import annotations

import copy
import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dcpsvc

FEATURES, CLASSES, BATCH = 8, 4, 6
SYNC_S = 20.0
"""For jobs in which nobody is ever late: longer than a busy machine can need."""


class Net(nn.Module):
    """Every kind of layer whose state is easy to get wrong: dropout draws numbers, batch norm has buffers."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, width)
        self.middle = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.layer_norm = nn.LayerNorm(width)
        self.batch_norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.25)
        self.last = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.middle:
            x = layer(x)
        return self.last(self.dropout(self.batch_norm(self.layer_norm(x)).relu()))


class Loader:
    """A data loader with a position; every batch is a function of rank and position.

    Attributes:
        owner: The rank whose position this is, to tell which one came back.
    """

    def __init__(self, rank: int) -> None:
        self.owner, self.position = rank, 0

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.owner + self.position)
        self.position += 1
        x = torch.randn(BATCH, FEATURES, generator=generator)
        return x, torch.randint(CLASSES, (BATCH,), generator=generator)

    def state_dict(self) -> dict[str, Any]:
        return {"owner": self.owner, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.owner, self.position = state["owner"], state["position"]


class Training:
    """One rank of a training run.

    Args:
        kind: ``plain``, ``ddp`` or ``fsdp``.
        rank: Of the default group; its own data.
        seed: Of the weights, and, with the rank, of the generators.
        width: Of the layers.
        depth: Further layers of that width.
        dtype: Of the weights.
    """

    def __init__(
        self,
        kind: str,
        rank: int,
        *,
        seed: int = 0,
        width: int = 16,
        depth: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(seed)
        self.core = Net(width, depth).to(dtype)
        self.model = _wrapped(kind, self.core)
        self.dtype = dtype
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=3, gamma=0.8)
        self.loader = Loader(rank)
        self.trainer: dict[str, Any] = {"steps": 0, "history": []}
        self.state: dict[str, Any] = {
            "model": self.model,
            "optim": self.optimizer,
            "sched": self.scheduler,
            "loader": dcpsvc.PerRank(self.loader),
            "rng": dcpsvc.Rng(),
            "trainer": self.trainer,
        }
        torch.manual_seed(100 + 10 * seed + rank)
        np.random.seed(200 + 10 * seed + rank)  # noqa: NPY002 - the global one, as training code uses it
        random.seed(300 + 10 * seed + rank)

    def step(self) -> float:
        """One optimizer step; uses every generator that :class:`dcpsvc.Rng` keeps."""
        x, target = self.loader.next()
        x = x + 0.01 * (random.random() + float(np.random.rand()))  # noqa: NPY002
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x.to(self.dtype)), target)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.trainer["steps"] += 1
        self.trainer["history"].append(self.scheduler.get_last_lr()[0])
        return float(loss)

    def train(self, steps: int) -> list[str]:
        """Losses, to the last bit."""
        return [self.step().hex() for _ in range(steps)]

    def fingerprint(self) -> dict[str, str]:
        """A hash for each whole parameter and each entry of the optimizer's state. Collective under FSDP2."""
        found: dict[str, str] = {}
        for name, parameter in self.core.named_parameters():
            found[f"model.{name}"] = _hash(parameter)
            for entry, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                found[f"optim.{name}.{entry}"] = _hash(value)
        return found

    def own(self) -> dict[str, Any]:
        """What belongs to this rank alone, and the counters."""
        numbers = [float(torch.rand(())), float(np.random.rand()), random.random()]  # noqa: NPY002
        return {
            "owner": self.loader.owner,
            "position": self.loader.position,
            "next numbers": [number.hex() for number in numbers],
            "trainer": copy.deepcopy(self.trainer),
            "lr": self.scheduler.get_last_lr(),
        }

    def buffers(self) -> dict[str, str]:
        """A hash for each buffer."""
        return {name: _hash(buffer) for name, buffer in self.core.named_buffers()}


def checkpointer(
    root: Any, state: dict[str, Any], *, local: Any = None, store: Any = None, **options: Any
) -> dcpsvc.Checkpointer:
    """A Checkpointer with its local tier beside the run root, and patient unless told otherwise.

    A store of the test's own stands for the run root where there is one.
    """
    place = Path(root)
    options.setdefault("sync_timeout_s", SYNC_S)
    return dcpsvc.Checkpointer(store or place, state, local=local or place.parent / "local", **options)


def committed(root: Any) -> list[int]:
    """The steps a listing calls committed."""
    return [found.step for found in dcpsvc.list_checkpoints(root) if found.state == "committed"]


def files(folder: Any) -> list[str]:
    """Every file below a folder, by its name from there; those left out that are there while a run is."""
    place = Path(folder)
    found = [path for path in place.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(place)) for path in found if path.suffix != ".lock" and path.name != "run-root")


def step_files(folder: Any, step: int) -> list[str]:
    """Files below a folder that belong to a step; the mark of its deletion left out, which goes with a later commit."""
    return [name for name in files(folder) if f"step-{step:012d}." in name and not name.startswith("tombstones/")]


def flip_byte(path: Path, at: int | None = None) -> None:
    """Change one bit in the middle of a file, or at a place."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """Cut the last quarter of a file off."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])


def _wrapped(kind: str, core: nn.Module) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(core)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (core.first, core.last):
            fully_shard(layer, mesh=mesh)
        return fully_shard(core, mesh=mesh)
    return core


def _hash(value: Any) -> str:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, torch.Tensor):
        whole = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return f"{value.dtype} {list(value.shape)} {hashlib.sha256(whole.numpy().tobytes()).hexdigest()[:16]}"
    return repr(value)
