"""What everybody saves: transformer blocks with AdamW, sharded or replicated, and whether a copy of it is whole."""

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import size

_HEAD_WIDTH = 64
_TOKENS = 64  # few, so that a step is short: 0.3 to 0.5 s for 1.5 GiB of state on two cores


class Block(nn.Module):
    """Attention and a feed-forward layer: 12 x width x width parameters."""

    def __init__(self, width):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, -1, _HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm_2(x))))


class Workload:
    """One rank of a training run with about ``mib`` MiB of model and optimizer state.

    Args:
        kind: ``fsdp2`` or ``ddp``.
        mib: Of the whole state, however many ranks share it.
    """

    def __init__(self, kind, mib):
        torch.manual_seed(0)
        self.kind, self.rank, self.world = kind, dist.get_rank(), dist.get_world_size()
        width, depth = size.shape(mib)
        blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.model = _wrapped(kind, blocks)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.input = torch.randn(1, _TOKENS, width)
        self.forward_backward()
        self.optimizer.step()
        self.nbytes = size.nbytes(mib)

    def forward_backward(self):
        """The part of a step that changes no state."""
        self.optimizer.zero_grad()
        self.model(self.input).square().mean().backward()

    def change(self):
        """The part of a step that changes every tensor of the state."""
        self.optimizer.step()

    def step(self):
        """A whole training step."""
        self.forward_backward()
        self.change()

    def state_dict(self, *, full=False):
        """As DCP's users get it; ``full`` gathers everything on rank 0."""
        options = StateDictOptions(full_state_dict=full, cpu_offload=full)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optim": optimizer}

    def tensors(self):
        """Every tensor of the state by its DCP name, whole DTensors where they are sharded. Nothing is copied."""
        state = self.state_dict()
        found = {f"model.{name}": tensor for name, tensor in state["model"].items()}
        for name, entries in state["optim"]["state"].items():
            found |= {f"optim.state.{name}.{entry}": tensor for entry, tensor in entries.items()}
        return found

    def local_tensors(self):
        """The same, but of a sharded tensor the part this rank holds."""
        return {key: local(tensor) for key, tensor in self.tensors().items()}

    def digests(self):
        """What this rank holds now, to be compared with what was saved."""
        return {key: xxhash.xxh3_64(bytes_of(tensor)).hexdigest() for key, tensor in self.local_tensors().items()}


def local(tensor):
    """The part of a tensor in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bytes_of(tensor):
    """The bytes of a tensor, not copied where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _wrapped(kind, blocks):
    if kind == "ddp":
        return DistributedDataParallel(blocks)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(blocks, mesh=mesh)
