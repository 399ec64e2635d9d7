"""What everybody writes first: gather the state on rank 0 and ``torch.save`` it there. No fsync of its own."""

import torch
from torch.distributed.tensor import DTensor

from benchmarks.peers.system import System


class Adapter(System):
    background = False

    def save(self, step):
        state = self.workload.state_dict(full=True)  # empty on the other ranks
        if self.workload.rank == 0:
            self.path(step).mkdir()
            torch.save(state, self.path(step) / "state.pt")

    def load(self, step):
        saved = torch.load(self.path(step) / "state.pt", mmap=True, weights_only=True)
        flat = {f"model.{name}": tensor for name, tensor in saved["model"].items()}
        for name, entries in saved["optim"]["state"].items():
            flat |= {f"optim.state.{name}.{entry}": tensor for entry, tensor in entries.items()}
        for key, tensor in self.workload.tensors().items():
            _copy_part(tensor.detach(), flat[key])


def _copy_part(target, whole):
    """A rank that holds a part takes that part."""
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    for chunk in target.__create_chunk_list__():
        for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            whole = whole.narrow(dim, offset, size)
        target.to_local().copy_(whole)
