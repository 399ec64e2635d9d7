"""One model trained in every way a job may be divided, on batches that are the same for all of them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import dcpsvc

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.device_mesh import DeviceMesh

WIDTH, HIDDEN, CLASSES, BATCH = 15, 10, 2, 8
"""15 and 10 divide by neither 2, 3 nor 4 alike; a bias of 2 elements leaves ranks with nothing."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Model(nn.Module):
    """Its parts may be missing: a pipeline stage has only some."""

    def __init__(self) -> None:
        super().__init__()
        self.embed: nn.Module | None = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleDict({str(number): Block() for number in range(2)})
        self.head: nn.Module | None = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) if self.embed is not None else x
        for block in self.blocks.values():
            x = block(x)
        return self.head(x) * self.scale if self.head is not None else x


def sharded(model: Model, mesh: DeviceMesh | None, **options: Any) -> nn.Module:
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model: Model, mesh: DeviceMesh) -> Model:
    for block in model.blocks.values():
        inner = getattr(block, "_checkpoint_wrapped_module", block)
        parallelize_module(inner, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def mesh_of(*shape: int, names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def fsdp(model: Model) -> nn.Module:
    return sharded(model, mesh_of(dist.get_world_size(), names=("dp",)))


def hsdp(model: Model) -> nn.Module:
    return sharded(model, mesh_of(2, 2, names=("replica", "shard")))


def fsdp1(model: Model, **options: Any) -> nn.Module:
    """Each block is a unit, what is around them another."""
    options |= {"device_id": torch.device("cpu"), "use_orig_params": options.get("use_orig_params", True)}
    for name, block in list(model.blocks.items()):
        model.blocks[name] = FullyShardedDataParallel(block, **options)
    return FullyShardedDataParallel(model, **options)


def fsdp1_hybrid(model: Model) -> nn.Module:
    mesh = mesh_of(2, 2, names=("replica", "shard"))
    return fsdp1(model, sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh)


def offloaded(model: Model) -> nn.Module:
    return sharded(model, mesh_of(2, names=("dp",)), offload_policy=CPUOffloadPolicy(pin_memory=False))


def in_bfloat16(model: Model) -> nn.Module:
    """Computed so; parameters and moments stay as they are."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return sharded(model, mesh_of(2, names=("dp",)), mp_policy=policy)


def fsdp_and_tp(model: Model) -> nn.Module:
    mesh = mesh_of(2, 2, names=("dp", "tp"))
    return sharded(tensor_parallel(model, mesh["tp"]), mesh["dp"])


def checkpointed(model: Model) -> Model:
    for name, block in list(model.blocks.items()):
        model.blocks[name] = checkpoint_wrapper(block)
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def stage(model: Model, number: int) -> Model:
    """The first half, or the second, under the names of the whole."""
    model.blocks = nn.ModuleDict({str(number): model.blocks[str(number)]})
    if number:
        model.embed = None
    else:
        model.head = None
        del model.scale
    return model


def piped_and_sharded(model: Model) -> nn.Module:
    mesh = mesh_of(2, 2, names=("pp", "dp"))
    return sharded(stage(model, dist.get_rank() // 2), mesh["dp"])


KINDS: dict[str, tuple[int, Callable[[Model], nn.Module]]] = {
    "one": (0, lambda model: model),
    "one, compiled": (0, compiled),
    "DDP": (2, DistributedDataParallel),
    "DDP, compiled": (2, lambda model: compiled(DistributedDataParallel(model))),
    "FSDP2": (2, fsdp),
    "FSDP2 on 3": (3, fsdp),
    "FSDP2, offload": (2, offloaded),
    "FSDP2, bf16": (2, in_bfloat16),
    "FSDP2, recompute": (2, lambda model: fsdp(checkpointed(model))),
    "FSDP2, compiled": (2, lambda model: compiled(fsdp(model))),
    "HSDP 2x2": (4, hsdp),
    "FSDP1": (2, lambda model: fsdp1(checkpointed(model))),
    "FSDP1 on 3, flat": (3, lambda model: fsdp1(model, use_orig_params=False)),
    "FSDP1, not sharded": (2, lambda model: fsdp1(model, sharding_strategy=ShardingStrategy.NO_SHARD)),
    "FSDP1 2x2": (4, fsdp1_hybrid),
    "TP": (2, lambda model: tensor_parallel(model, mesh_of(2, names=("tp",)))),
    "FSDP2 x TP": (4, fsdp_and_tp),
    "pipeline": (2, lambda model: stage(model, dist.get_rank())),
    "pipeline x FSDP2": (4, piped_and_sharded),
    "pipeline x DP": (4, lambda model: stage(model, dist.get_rank() // 2)),
}
"""Ranks (0: no process group), and what is done to the model."""


class Job:
    """One rank of a training run of some kind.

    Args:
        kind: Of :data:`KINDS`.
        seed: Of the weights.
    """

    def __init__(self, kind: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.kind = kind
        self.core = Model()
        self.model = KINDS[kind][1](self.core)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.8)
        model: Any = self.model
        if kind == "pipeline":
            model = dcpsvc.Part(self.model)
        elif "pipeline" in kind:  # two ranks have the same stage, or shards of it
            first = dist.get_rank() // 2 * 2
            model = dcpsvc.Part(self.model, [first, first + 1])
        self.state = {"model": model, "optim": self.optimizer, "sched": self.schedule}

    def train(self, first: int, steps: int) -> list[str]:
        """Losses to the last bit; empty on ranks that do not see any."""
        return [loss.hex() for step in range(first, first + steps) for loss in self._step(step)]

    def _step(self, step: int) -> list[float]:
        draw = torch.Generator().manual_seed(step)
        x, wanted = torch.randn(BATCH, 4, generator=draw), torch.randn(BATCH, CLASSES, generator=draw)
        self.optimizer.zero_grad()
        losses = self._pipe(x, wanted) if "pipeline" in self.kind else self._all(x, wanted)
        self.optimizer.step()
        self.schedule.step()
        return losses

    def _all(self, x: torch.Tensor, wanted: torch.Tensor) -> list[float]:
        loss = (self.model(x) - wanted).square().mean()
        loss.backward()
        return [float(loss)]

    def _pipe(self, x: torch.Tensor, wanted: torch.Tensor) -> list[float]:
        """Two stages, one after the other."""
        rank, half = dist.get_rank(), dist.get_world_size() // 2
        between = torch.empty(BATCH, WIDTH)
        if rank < half:
            out = self.model(x)
            dist.send(out.detach(), rank + half)
            dist.recv(between, rank + half)
            out.backward(between)
            return []
        dist.recv(between, rank - half)
        loss = (self.model(between.requires_grad_()) - wanted).square().mean()
        loss.backward()
        dist.send(between.grad, rank - half)
        return [float(loss)]

    def prints(self) -> dict[str, str]:
        """A hash of every whole tensor this rank knows of, by the names of the whole model. Collective."""
        if "FSDP1" in self.kind:
            return self._gathered()
        found: dict[str, str] = {}
        for name, parameter in self.core.named_parameters():
            plain = name.replace("_checkpoint_wrapped_module.", "")
            found[f"model.{plain}"] = hashed(parameter)
            for entry, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                found[f"optim.{plain}.{entry}"] = hashed(value)
        for name, buffer in self.core.named_buffers():
            found[f"model.{name}"] = hashed(buffer)
        return found

    def _gathered(self) -> dict[str, str]:
        """As torch's own state dicts of FSDP1 have it, which are collective."""
        kinds = (FullStateDictConfig(rank0_only=False), FullOptimStateDictConfig(rank0_only=False))
        with FullyShardedDataParallel.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, *kinds):
            whole = self.model.state_dict()
            states = FullyShardedDataParallel.optim_state_dict(self.model, self.optimizer)["state"]
        if self.kind in {"FSDP1", "FSDP1 2x2"}:  # torch 2.13 on CPU gives exp_avg_sq for exp_avg there
            states = self._concatenated(whole)
        found = {f"model.{name}": hashed(value) for name, value in whole.items()}
        for name, entries in states.items():
            found |= {f"optim.{name}.{entry}": hashed(value) for entry, value in sorted(entries.items())}
        return found

    def _concatenated(self, whole: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Each rank has a piece of each parameter, and state for it if it is not empty."""
        state = self.optimizer.state
        mine = {clean_tensor_name(name): state[p] for name, p in self.model.named_parameters() if p in state}
        by_rank: list[Any] = [None] * self.model.process_group.size()
        dist.all_gather_object(by_rank, mine, group=self.model.process_group)
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name in {name for one in by_rank for name in one}:
            pieces = [one[name] for one in by_rank if name in one]
            found[name] = {
                entry: torch.cat([piece[entry] for piece in pieces]).view(whole[name].shape) if value.dim() else value
                for entry, value in pieces[0].items()
            }
        return found


def hashed(value: torch.Tensor) -> str:
    """Of a whole tensor, with what it is. Collective for a sharded one."""
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    data = whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{whole.dtype} {list(whole.shape)} {hashlib.sha256(data).hexdigest()[:16]}"
