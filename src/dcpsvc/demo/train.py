"""Train a small GPT, checkpointed by dcpsvc: the example to copy from.

The checkpoint code is the ``Checkpointer(...)`` in ``main``, its ``resume()`` and its ``step()``. Run it with::

    torchrun --nproc-per-node 2 -m dcpsvc.demo.train --root /tmp/run --parallel fsdp
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import dcpsvc
from dcpsvc.demo.journal import Journal, Kill
from dcpsvc.demo.model import GPT, GPTConfig
from dcpsvc.demo.text import TextLoader, read_corpus

if TYPE_CHECKING:
    from torch.optim import Optimizer

BATCH = 4
LEARNING_RATE = 3e-3
WARMUP_STEPS = 10


def main() -> None:
    """Train until ``--steps``, from the newest checkpoint under ``--root`` if there is one."""
    args = parse_args()
    rank, world = start_ranks(args.parallel)
    cfg = GPTConfig(dropout=args.dropout)
    torch.manual_seed(args.seed)  # the same weights on every rank ...
    model = parallelize(GPT(cfg), args.parallel)
    torch.manual_seed(args.seed + 1 + rank)  # ... but its own dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scheduler = warmup_and_cosine(optimizer, args.steps)
    loader = TextLoader(read_corpus(), BATCH, cfg.block, rank=rank, world=world, seed=args.seed)
    journal = Journal(args.journal, rank, args.kill)

    ckpt = dcpsvc.Checkpointer(
        args.root,
        {
            "model": model,
            "optim": optimizer,
            "sched": scheduler,
            "loader": dcpsvc.PerRank(loader),
            "rng": dcpsvc.Rng(),
        },
        local=args.nvme,
        every=dcpsvc.Every(steps=args.every),
        keep=dcpsvc.Latest(3),
        storage_options=args.storage_options,
        on_event=journal.event,
    )
    with ckpt:
        start = ckpt.resume()
        journal.resumed(start)
        for step in range(start + 1, args.steps + 1):
            loss = train_step(model, optimizer, loader)
            scheduler.step()
            journal.step(step, loss)
            outcome = ckpt.step(step, metrics={"loss": loss})
            if outcome.pending is not None:
                journal.save(outcome.pending)
            if outcome.should_stop:
                break
    journal.done()
    if dist.is_initialized():
        dist.destroy_process_group()


def train_step(model: nn.Module, optimizer: Optimizer, loader: TextLoader) -> float:
    """One optimizer step; returns the loss averaged over all ranks."""
    tokens, targets = loader.next_batch()
    loss: torch.Tensor = model(tokens, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.item()


def start_ranks(parallel: str) -> tuple[int, int]:
    """Join the other ranks, and make every run of the same seed the same to the last bit."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    if parallel == "none":
        return 0, 1
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def parallelize(model: GPT, parallel: str) -> nn.Module:
    """Shard the model with FSDP2, replicate it with DDP, or leave it as it is."""
    if parallel == "ddp":
        return DistributedDataParallel(model)
    if parallel == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def warmup_and_cosine(optimizer: Optimizer, steps: int) -> SequentialLR:
    """Linear warm-up, then cosine decay to zero at the last step."""
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=WARMUP_STEPS)
    cosine = CosineAnnealingLR(optimizer, T_max=max(1, steps - WARMUP_STEPS))
    return SequentialLR(optimizer, [warmup, cosine], milestones=[WARMUP_STEPS])


def parse_args() -> argparse.Namespace:
    """Options of the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="run root: a directory or an fsspec URL")
    parser.add_argument("--nvme", help="this node's fast disk: the local tier")
    parser.add_argument("--parallel", choices=["fsdp", "ddp", "none"], default="fsdp")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=20, help="save every so many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--journal", type=Path, default=Path(os.devnull), help="report here, one JSON object a line")
    parser.add_argument("--kill", type=Kill.parse, metavar="PHASE:STEP:RANK", help="SIGKILL this rank at this point")
    options = os.environ.get("DCPSVC_DEMO_STORAGE_OPTIONS", "{}")  # may hold credentials: not for a command line
    parser.set_defaults(storage_options=json.loads(options))
    return parser.parse_args()


if __name__ == "__main__":
    main()
