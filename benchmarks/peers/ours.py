"""dcpsvc. Measured up to "on every rank's local disk", as the others are, or up to its commit at the run root.

The others carry nothing anywhere, so in the first case the upload begins only when the measurement is over.
"""

import threading

from torch.distributed import checkpoint as dcp

import dcpsvc
from benchmarks.peers.system import System
from dcpsvc.storage.posix import PosixStore


class HeldRoot(PosixStore):
    """A run root that takes no shard before ``open`` is set."""

    def __init__(self, path, gate):
        super().__init__(path)
        self.open = gate

    def put_file(self, key, path, **options):
        self.open.wait()
        super().put_file(key, path, **options)


class Adapter(System):
    def __init__(self, workload, directory, until="local"):
        super().__init__(workload, directory)
        self._until_commit = until == "commit"
        self._gate = threading.Event()
        self._root = self.directory / "root"
        self._root.mkdir(exist_ok=True)
        state = {"model": workload.model, "optim": workload.optimizer}
        self._checkpointer = dcpsvc.Checkpointer(
            HeldRoot(self._root, self._gate), state, local=self.directory / "local",
            keep=dcpsvc.Latest(1), keep_local=1, save_last=False, stop_signals=(),
        )  # fmt: skip
        self._checkpointer.resume()  # as every job begins; nothing is there

    def save(self, step):
        if self._until_commit:
            self._gate.set()
        else:
            self._gate.clear()
        self._pending = self._checkpointer.save(step)

    def durable(self):
        (self._pending.committed if self._until_commit else self._pending.local).result()

    def finish(self, step):
        del step
        self._gate.set()
        self._pending.wait()
        self._checkpointer.wait()

    def load(self, step):
        dcp.load(self.workload.tensors(), storage_reader=dcpsvc.storage_reader(self._root, step))

    def discard(self, step):
        """Retention does it."""

    def close(self):
        self._gate.set()
        self._checkpointer.close()
