"""DLRover flash checkpoint 0.6: into shared memory, from where a process of the agent writes it. No fsync.

Its FSDP engine is for FSDP1, so each rank gives the parts it holds to the engine for whole states, one shard a rank.
"""

import os
import shutil
import time
from pathlib import Path

_JOB = "TORCHELASTIC_RUN_ID"
os.environ.setdefault(_JOB, f"bench-{os.environ['MASTER_PORT']}")
os.environ |= {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"]}

import torch  # noqa: E402
from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer  # noqa: E402 - it reads the names above

from benchmarks.peers.system import System  # noqa: E402


class Adapter(System):
    def __init__(self, workload, directory):
        super().__init__(workload, directory)
        shards = 1 if workload.kind == "ddp" else workload.world
        self._shard = workload.rank if shards > 1 else 0
        self._checkpointer = DdpCheckpointer(str(directory), local_shard_num=shards, global_shard_num=shards)

    def save(self, step):
        self._step = step
        path = self.path(step) / f"rank_{self._shard}.pt"
        self._checkpointer.save_checkpoint(step, self.workload.local_tensors(), str(path))

    def wait(self):
        """It tells nobody; the tracker file names the newest step that is written."""
        tracker = self.directory / "dlrover_latest.txt"
        while not tracker.exists() or tracker.read_text().strip() != str(self._step):
            time.sleep(0.002)

    def load(self, step):
        saved = torch.load(self.path(step) / f"rank_{self._shard}.pt", mmap=True, weights_only=True)
        for key, tensor in self.workload.local_tensors().items():
            tensor.detach().copy_(saved[key])

    def close(self):
        engine = self._checkpointer._engine  # noqa: SLF001 - it offers no end
        engine._shm_handler.unlink()  # noqa: SLF001
        engine.close()
        if engine.saver_proc:
            engine.saver_proc.terminate()
            engine.saver_proc.join()
        shutil.rmtree(Path("/tmp/ckpt_sock", os.environ[_JOB]), ignore_errors=True)  # noqa: S108 - its own place
