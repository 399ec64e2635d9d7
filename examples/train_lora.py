"""The loop of a LoRA trainer, with rank-0-only saving replaced: three lines, marked below.

    torchrun --nproc-per-node 2 examples/train_lora.py --root ./runs/lora --steps 40

Before, rank 0 alone called ``save_pretrained()`` between two barriers: the others waited for it at every save, an error
there left them waiting for good, and optimizer, schedule, data position and generators were lost. Now each rank writes
its own part in the background; a killed run goes on where it was; and each checkpoint has a ready PEFT folder in it.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

import dcpsvc


class Batches:
    """This rank's data, with a position."""

    def __init__(self, rank: int) -> None:
        self.rank, self.position = rank, 0

    def next(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * self.rank + self.position)
        self.position += 1
        return torch.randint(64, (4, 12), generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"rank": self.rank, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.rank, self.position = state["rank"], state["position"]


def build() -> torch.nn.Module:
    """A small base that is frozen, and its adapter."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=16))
    lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1)
    model = get_peft_model(base, lora)
    return DistributedDataParallel(model) if dist.is_initialized() else model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", required=True)
    parser.add_argument("--nvme", help="this node's fast tier")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    options = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0

    model, batches = build(), Batches(rank)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 8, 0.5)
    torch.manual_seed(100 + rank)
    state = {
        "model": model, "optim": optimizer, "sched": schedule,
        "batches": dcpsvc.PerRank(batches), "rng": dcpsvc.Rng(),
    }  # fmt: skip
    with dcpsvc.Checkpointer(  # 1: instead of `if rank == 0: model.save_pretrained(...)`
        options.root, state, local=options.nvme, every=dcpsvc.Every(steps=options.every), keep=dcpsvc.Latest(2),
        only="trainable", adapter_folder="model", total_steps=options.steps,
    ) as ckpt:  # fmt: skip
        start = ckpt.resume()  # 2: where the last run was
        for step in range(start + 1, options.steps + 1):
            ids = batches.next()
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            print(f"rank {rank} step {step} loss {float(loss).hex()}", flush=True)
            if ckpt.step(step, metrics={"loss": float(loss)}).should_stop:  # 3: saves when due
                break
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
