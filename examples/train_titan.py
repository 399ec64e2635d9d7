"""The loop of torchtitan's trainer, with its CheckpointManager replaced: two lines, marked below.

    torchrun --nproc-per-node 2 examples/train_titan.py --root ./runs/titan --steps 40

A trainer that is a Stateful itself, parts of a model under FSDP2, containers of optimizers and schedules for them, a
StatefulDataLoader: each is given as it is. Only what is another on each rank says so.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR
from torchdata.stateful_dataloader import StatefulDataLoader

import dcpsvc

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCABULARY, LENGTH = 64, 16


class Tokens(torch.utils.data.IterableDataset[torch.Tensor]):
    """Samples of one rank without an end, with a position."""

    def __init__(self, rank: int) -> None:
        self.rank, self.at = rank, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            generator = torch.Generator().manual_seed(1000 * self.rank + self.at)
            self.at += 1
            yield torch.randint(VOCABULARY, (LENGTH + 1,), generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class OptimizersContainer(torch.optim.Optimizer):
    """One optimizer for each part of the model, stepped as one; all state is theirs."""

    def __init__(self, model_parts: list[nn.Module], **options: float) -> None:
        self.optimizers = [torch.optim.AdamW(part.parameters(), **options) for part in model_parts]
        super().__init__([p for part in model_parts for p in part.parameters()], options)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class LRSchedulersContainer:
    """The same schedule for each of them, so that one state stands for all."""

    def __init__(self, optimizers: OptimizersContainer) -> None:
        self.schedulers = [LambdaLR(each, lambda step: min(1.0, (step + 1) / 10)) for each in optimizers.optimizers]

    def step(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self.schedulers[0].state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for scheduler in self.schedulers:
            scheduler.load_state_dict(dict(state))


class Trainer:
    """Is the train state itself: ``state_dict()`` has its counters."""

    def __init__(self, options: argparse.Namespace) -> None:
        rank, self.steps = dist.get_rank(), options.steps
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Dropout(0.1), nn.Linear(64, 32)) for _ in range(2)]
        self.model = nn.Sequential(nn.Embedding(VOCABULARY, 32), *layers, nn.Linear(32, VOCABULARY))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        self.optimizers = OptimizersContainer([fully_shard(self.model, mesh=mesh)], lr=1e-2)
        self.lr_schedulers = LRSchedulersContainer(self.optimizers)
        own = torch.Generator()  # an iterator draws a number when it is made, which is later in a run that resumes
        self.dataloader = StatefulDataLoader(Tokens(rank), batch_size=4, generator=own)
        self.step, self.ntokens_seen = 0, 0
        torch.manual_seed(100 + rank)
        states = {
            "model": self.model, "optimizer": self.optimizers, "lr_scheduler": self.lr_schedulers,
            "dataloader": dcpsvc.PerRank(self.dataloader), "train_state": self, "rng": dcpsvc.Rng(),
        }  # fmt: skip
        self.checkpointer = dcpsvc.Checkpointer(  # 1: instead of CheckpointManager(...), and of its load()
            options.root, states, local=options.nvme, every=dcpsvc.Every(steps=options.every), keep=dcpsvc.Latest(2)
        )

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.ntokens_seen = state["step"], state["ntokens_seen"]

    def train(self) -> None:
        with self.checkpointer as checkpointer:
            checkpointer.resume()
            batches = iter(self.dataloader)
            while self.step < self.steps:
                self.step += 1
                loss = self.train_step(next(batches))
                print(f"rank {dist.get_rank()} step {self.step} loss {loss.hex()}", flush=True)
                if checkpointer.step(self.step, metrics={"loss": loss}).should_stop:  # 2: instead of its save()
                    break

    def train_step(self, tokens: torch.Tensor) -> float:
        self.optimizers.zero_grad()
        loss = nn.functional.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizers.step()
        self.lr_schedulers.step()
        self.ntokens_seen += tokens.numel()
        return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", required=True)
    parser.add_argument("--nvme", help="this node's fast tier")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    dist.init_process_group("gloo")
    Trainer(parser.parse_args()).train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
