"""Who should write a staged shard: a thread of the training process, or a helper process beside it?

    python -m benchmarks.bench_writer --mib 1536 --rounds 5 --out benchmarks/results/writer.json

Both run the same code on the same bytes, beside the same training loop: 64 MiB at a time around the page cache, the
checksum meanwhile, fsync. The thread writes from our arena (private, huge pages); the helper, started with the job,
from memory it shares with the training process. ``copy`` is what staging into that memory takes; ``speed`` is the
training's (undisturbed: 1); CPU seconds are those beyond the training's own.
"""

import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.table import Table

from benchmarks.common.facts import facts
from benchmarks.common.options import plain_parser
from benchmarks.common.process import tree_cpu_s
from benchmarks.common.report import write
from dcpsvc.format import digest
from dcpsvc.stages.shard import write_durably
from dcpsvc.storage.diskfile import DiskFile

_WRITE_NBYTES = 32 << 20
_QUIET_STEPS = 3


def write_image(image, path):
    """As the shard stage does it."""
    parts = (image[begin : begin + _WRITE_NBYTES] for begin in range(0, len(image), _WRITE_NBYTES))
    with DiskFile(path, len(image) + digest.table_nbytes(len(image))) as file:
        table = write_durably(file, parts, lasting=True)
        file.keep()
    return digest.digest(table)


class Thread:
    """Writes from private memory, on a thread."""

    name = "thread"

    def __init__(self, nbytes):
        from dcpsvc.arena import Arena

        self._arena = Arena()
        self.image = self._arena.reserve(nbytes)

    def begin(self, path):
        self.ended = None
        threading.Thread(target=self._write, args=(path,)).start()

    def _write(self, path):
        write_image(self.image.numpy().data, path)
        self.ended = time.perf_counter()

    def close(self):
        self._arena.release()


class Helper:
    """Writes from shared memory, in a process that has no torch."""

    name = "process"

    def __init__(self, nbytes):
        import torch

        shared = os.memfd_create("bench-writer")
        os.ftruncate(shared, nbytes)
        self._memory = mmap.mmap(shared, nbytes)
        self.image = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.image[:: mmap.PAGESIZE] = 0
        command = [sys.executable, "-m", "benchmarks.bench_writer", "--serve", str(shared)]
        self._process = subprocess.Popen(command, pass_fds=[shared], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        os.close(shared)
        self.begin(None)  # it has started
        self._ends.join()

    def begin(self, path):
        self.ended = None
        self._process.stdin.write(json.dumps(path and str(path)).encode() + b"\n")
        self._process.stdin.flush()
        self._ends = threading.Thread(target=self._wait)
        self._ends.start()

    def _wait(self):
        self._process.stdout.readline()
        self.ended = time.perf_counter()

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def serve(descriptor):
    """The helper: a path a line, an answer a line."""
    image = memoryview(mmap.mmap(descriptor, 0))
    for line in sys.stdin:
        path = json.loads(line)
        print(path and write_image(image, Path(path)), flush=True)


def measure(workload, writer, path):
    """One save: copy, then write while training goes on."""
    import torch

    cpu_s = tree_cpu_s()
    quiet_s = _steps_s(workload, _QUIET_STEPS)
    quiet_cpu_s = (tree_cpu_s() - cpu_s) / _QUIET_STEPS
    os.sync()
    sources = [tensor.reshape(-1).view(torch.uint8) for tensor in workload.local_tensors().values() if tensor.dim()]
    cpu_s, began, at = tree_cpu_s(), time.perf_counter(), 0
    for source in sources:
        writer.image[at : at + source.numel()].copy_(source)
        at += source.numel()
    copied, steps = time.perf_counter(), 0
    writer.begin(path)
    while not writer.ended:
        _steps_s(workload, 1)
        steps += 1
    ended = time.perf_counter()
    path.unlink()
    return {
        "copy_s": copied - began,
        "write_s": writer.ended - copied,
        "speed": steps * quiet_s / (ended - copied),
        "cpu_s": tree_cpu_s() - cpu_s - steps * quiet_cpu_s,
    }


def _steps_s(workload, count):
    began = time.perf_counter()
    for _ in range(count):
        workload.forward_backward()
        workload.change()
    return (time.perf_counter() - began) / count


def _draw(console, rows):
    table = Table(title="who writes", box=None)
    for heading in ("", "copy s", "write s", "speed", "CPU s", "write, x thread", "speed, x thread"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["who"], *(f"{row[name]:.3f}" for name in ("copy_s", "write_s", "speed", "cpu_s")),
            f"{row['write_s'] / rows[0]['write_s']:.2f}", f"{row['speed'] / rows[0]['speed']:.2f}",
        )  # fmt: skip
    console.print(table)


def main():
    made = plain_parser(__doc__)
    made.add_argument("--mib", type=int, default=1536)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--dir", type=Path)
    options = made.parse_args()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    import torch.distributed as dist

    from benchmarks.common.workload import Workload

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    workload = Workload("fsdp2", options.mib)
    nbytes = -(-workload.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    writers = [Thread(nbytes), Helper(nbytes)]
    found = {writer.name: [] for writer in writers}
    try:
        with tempfile.TemporaryDirectory(prefix="dcpsvc-bench-", dir=options.dir) as directory:
            for number in range(options.rounds + 1):
                for writer in writers[:: 1 if number % 2 else -1]:
                    one = measure(workload, writer, Path(directory, "shard"))
                    if number:  # the first round warms up
                        found[writer.name].append(one)
    finally:
        for writer in writers:
            writer.close()
    rows = [
        {"who": who, **{name: statistics.median(one[name] for one in rounds) for name in rounds[0]}, "rounds": rounds}
        for who, rounds in found.items()
    ]
    about = facts(options.dir or tempfile.gettempdir(), {"mib": options.mib, "rounds": options.rounds})
    write(options, {"facts": about, "rows": rows}, lambda console: _draw(console, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]))
    else:
        main()
