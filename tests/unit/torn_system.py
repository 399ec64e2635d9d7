"""A system for the benchmarks that remembers where the state is instead of copying it."""

from __future__ import annotations

from benchmarks.peers.system import System


class Adapter(System):
    def save(self, step):
        del step
        self.kept = self.workload.local_tensors()

    def load(self, step):
        del step
        for key, tensor in self.workload.local_tensors().items():
            tensor.detach().copy_(self.kept[key])
