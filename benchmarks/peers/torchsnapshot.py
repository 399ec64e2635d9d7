"""torchsnapshot 0.1: ``Snapshot.async_take``. It knows no DTensor, so each rank gives the parts it holds."""

import torchsnapshot

from benchmarks.peers.system import System


class Adapter(System):
    def save(self, step):
        shared = ["**"] if self.workload.kind == "ddp" else []
        self._pending = torchsnapshot.Snapshot.async_take(str(self.path(step)), self._state(), replicated=shared)

    def wait(self):
        self._pending.wait()

    def load(self, step):
        torchsnapshot.Snapshot(str(self.path(step))).restore(self._state())

    def _state(self):
        return {"state": torchsnapshot.StateDict(**self.workload.local_tensors())}
