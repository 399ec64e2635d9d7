"""Everything that can be measured: ours, and what users could pick instead. One small adapter each.

Importing this imports none of them: each may need an environment of its own, made by ``make peers``.
"""

import sys
from dataclasses import dataclass

from benchmarks.peers import install


@dataclass(frozen=True)
class Entry:
    """One system.

    Attributes:
        label: For tables.
        module: Where its ``Adapter`` is.
        options: For its adapter.
        environment: Name of its own virtual environment; empty: the one this runs in.
        memory: Host memory it takes, in multiples of the state; decides how many run side by side.
        divides: Whether replicas hold only what they write; the others hold the whole state on each rank.
        kinds: Workloads it can save.
        fsyncs: Whether it syncs its files; if not, that is added to its durable time.
    """

    label: str
    module: str
    options: tuple = ()
    environment: str = ""
    memory: float = 1.2
    divides: bool = False
    kinds: tuple = ("fsdp2", "ddp")
    fsyncs: bool = True

    @property
    def python(self):
        """Its interpreter; None where its environment is missing."""
        return install.python_of(self.environment) if self.environment else sys.executable


OURS = "dcpsvc"

SYSTEMS = {
    OURS: Entry("dcpsvc", "benchmarks.peers.ours", divides=True),
    "dcpsvc_commit": Entry("dcpsvc, to the commit", "benchmarks.peers.ours", ("commit",), divides=True),
    "torch_save": Entry("torch.save on rank 0 (gathered)", "benchmarks.peers.torch_save", fsyncs=False),
    "dcp": Entry("DCP save", "benchmarks.peers.dcp", ("sync",), memory=0.2),
    "dcp_thread": Entry("DCP async THREAD", "benchmarks.peers.dcp", ("thread", "default"), memory=2.0),
    "dcp_thread_cached": Entry(
        "DCP async THREAD, cached stager", "benchmarks.peers.dcp", ("thread", "cached"), memory=2.0
    ),
    "dcp_thread_shm": Entry(
        "DCP async THREAD, shared-memory stager", "benchmarks.peers.dcp", ("thread", "shm"), memory=1.5
    ),
    "dcp_thread_async": Entry(
        "DCP async THREAD, async stager", "benchmarks.peers.dcp", ("thread", "async"), memory=1.5
    ),
    "dcp_process": Entry("DCP async PROCESS", "benchmarks.peers.dcp", ("process", "default"), memory=5.0),
    "dcp_process_shm": Entry(
        "DCP async PROCESS, shared-memory stager", "benchmarks.peers.dcp", ("process", "shm"), memory=1.6
    ),
    "dcp_process_async": Entry(
        "DCP async PROCESS, shm + async stager", "benchmarks.peers.dcp", ("process", "async"), memory=2.3
    ),
    "torchsnapshot": Entry(
        "torchsnapshot async_take",
        "benchmarks.peers.torchsnapshot",
        environment="torchsnapshot",
        memory=1.1,
        fsyncs=False,
    ),
    "torch_checkpointing": Entry(
        "torch_checkpointing",
        "benchmarks.peers.torch_checkpointing",
        environment="torch_checkpointing",
        memory=2.3,
        fsyncs=False,
    ),
    "nvrx": Entry(
        "nvidia-resiliency-ext (fork, copy-on-write)",
        "benchmarks.peers.nvrx",
        ("fork",),
        environment="nvrx",
        memory=1.5,
    ),
    "nvrx_persistent": Entry(
        "nvidia-resiliency-ext (persistent)", "benchmarks.peers.nvrx", ("persistent",), environment="nvrx", memory=1.5
    ),
    "dlrover": Entry(
        "DLRover flash checkpoint", "benchmarks.peers.dlrover", environment="dlrover", memory=2.1, fsyncs=False
    ),
}
