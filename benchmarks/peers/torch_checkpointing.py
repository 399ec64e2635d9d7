"""torch_checkpointing 0.1: staging beside the training into shared memory, written by a process of its own.

Set up as its documentation says for machines without CUDA: warmed up, with the lock around every change of the state.
Each rank gives the parts it holds; resharding would need metadata that it can only gather on CUDA. No barrier, as by
default, and no fsync. Without its direct I/O, which fails on ext4: its last block is not aligned.
"""

from torch_checkpointing import CheckpointManager
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from benchmarks.peers.system import System


class Adapter(System):
    def __init__(self, workload, directory):
        super().__init__(workload, directory)
        buffered = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(storage_config=buffered))
        self._manager.prewarm_staging(self._state())

    def save(self, step):
        self._written = self._manager.save(str(self.path(step)), self._state())

    def guard(self):
        return self._manager.lock()

    def wait(self):
        self._written.result()

    def load(self, step):
        loaded = self._manager.load(str(self.path(step)), into=self._state())
        for key, tensor in self._state()["state"].items():
            tensor.detach().copy_(loaded["state"][key])

    def close(self):
        self._manager.close()

    def _state(self):
        return {"state": self.workload.local_tensors()}
