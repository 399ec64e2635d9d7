"""nvidia-resiliency-ext 0.4: its DCP writer in a forked process (copy-on-write), or in one that stays.

It asks for a CUDA device at every save. Without CUDA that is an error, so there it is told "cpu" and waits for nothing.
"""

import functools
import time
import warnings

import torch

warnings.filterwarnings("ignore", category=FutureWarning)

if not torch.cuda.is_available():
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: "cpu"

from nvidia_resiliency_ext.checkpointing.async_ckpt import state_dict_saver  # noqa: E402 - after its missing CUDA
from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncCallsQueue, AsyncRequest  # noqa: E402
from nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async import FileSystemWriterAsync  # noqa: E402
from torch.distributed import checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner  # noqa: E402

from benchmarks.peers.system import System, fsync_tree  # noqa: E402


class Adapter(System):
    def __init__(self, workload, directory, process="fork"):
        super().__init__(workload, directory)
        state_dict_saver.init_checkpoint_metadata_cache()
        self._queue = AsyncCallsQueue(persistent=process == "persistent")

    def save(self, step):
        self.path(step).mkdir(exist_ok=True)
        writer = FileSystemWriterAsync(self.path(step), thread_count=2)
        plan = state_dict_saver.save_state_dict_async_plan(
            self.workload.state_dict(), writer, planner=DefaultSavePlanner(), enable_cache=True
        )
        function, _, arguments = writer.get_save_function_and_args()
        blocking = not torch.cuda.is_available()
        preload = functools.partial(FileSystemWriterAsync.preload_tensors, writer.write_buckets, not blocking)
        finish = [lambda: state_dict_saver.save_state_dict_async_finalize(*plan)]
        request = AsyncRequest(function, arguments, finish, preload_fn=preload)
        self._queue.schedule_async_request(request)

    def wait(self):
        self._queue.maybe_finalize_async_calls(blocking=True)

    def watch(self):
        """Its completion is collective, and asked for by the training loop."""
        self.durable_at = None
        return self._look

    def _look(self):
        self._queue.maybe_finalize_async_calls(blocking=False)
        if self._queue.get_num_unfinalized_calls():
            return False
        fsync_tree(self.directory)
        self.durable_at = self.durable_at or time.perf_counter()
        return True

    def load(self, step):
        dcp.load(self.workload.tensors(), checkpoint_id=self.path(step))

    def close(self):
        self._queue.close()
