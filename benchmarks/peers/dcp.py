"""torch.distributed.checkpoint itself: ``save``, and ``async_save`` with each stager that its documentation names.

All with the plan cache and with files synced; the directory is synced by us.
"""

import contextlib
import warnings
from concurrent.futures import Future

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.peers.system import System

STAGERS = {"cached": (False, False), "shm": (True, False), "async": (True, True)}


class Adapter(System):
    def __init__(self, workload, directory, executor="thread", stager="default"):
        super().__init__(workload, directory)
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
        self._executor, self._stager = executor, _stager(stager)
        self._future = self._staged = None
        self.background = executor != "sync"
        # Its thread's collectives and training's own would meet in one group and wait for ever: seen under DDP.
        self._group = dist.new_group(backend="gloo") if executor == "thread" else None

    def save(self, step):
        writer = dcp.FileSystemWriter(self.path(step))
        planner = DefaultSavePlanner(enable_plan_caching=True)
        state = self.workload.state_dict()
        if self._executor == "sync":
            dcp.save(state, storage_writer=writer, planner=planner)
            return
        saving = dcp.async_save(
            state, storage_writer=writer, planner=planner, async_stager=self._stager,
            async_checkpointer_type=AsyncCheckpointerType[self._executor.upper()], process_group=self._group,
        )  # fmt: skip
        if isinstance(saving, Future):
            self._future = saving
            return
        self._future, self._staged = saving.upload_completion, saving.staging_completion

    @contextlib.contextmanager
    def guard(self):
        if self._staged is not None:
            self._staged.result()
        yield

    def wait(self):
        if self._future is not None:
            self._future.result()

    def load(self, step):
        dcp.load(self.workload.tensors(), checkpoint_id=self.path(step))

    def close(self):
        if self._stager is not None:
            self._stager.close()


def _stager(name):
    if name == "default":
        return None
    shared, asynchronous = STAGERS[name]
    pinned = torch.cuda.is_available()
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=pinned, use_shared_memory=shared, use_async_staging=asynchronous,
            use_non_blocking_copy=pinned,
        )
    )  # fmt: skip
