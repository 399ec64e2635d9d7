"""What a tensor costs beside its bytes: a state of many small ones, staged and written.

    python -m benchmarks.bench_small --tensors 100000 --kib 4

Overhead: what ``save()`` and the write until the shard is on the local disk take longer than one copy of as many bytes
into touched memory and one raw ``O_DIRECT`` write of them, for each tensor; in wall time and in processor time.
"""

import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

import dcpsvc
from benchmarks.common.facts import facts
from benchmarks.common.limits import Limits
from benchmarks.common.options import LEAST_ROUNDS, plain_parser
from benchmarks.common.report import write
from benchmarks.peers.ours import HeldRoot

_GOAL_US = 20


def measure(options, directory, gate):
    """Rounds of saves, and what the machine allows in the same rounds."""
    count = options.kib * 1024 // 4
    tensors = {f"layer.{number}": torch.full((count,), float(number)) for number in range(options.tensors)}
    nbytes = options.tensors * options.kib * 1024
    limits, rounds = Limits(nbytes, 1, directory), []
    root = directory / "root"
    root.mkdir()
    with dcpsvc.Checkpointer(
        HeldRoot(root, gate), {"model": tensors}, local=directory / "local", save_last=False, stop_signals=(),
        keep=dcpsvc.Latest(1), keep_local=1,
    ) as checkpointer:  # fmt: skip
        checkpointer.resume()
        for step in range(1, options.rounds + 2):
            least = limits.measure()
            rounds.append(_save(checkpointer, step, gate) | {"least_s": least["memcpy_s"] + least["direct_s"]})
    first, later = rounds[0], rounds[1:]
    median = {name: statistics.median(one[name] for one in later) for name in first}
    over_s = median["durable_s"] - median["least_s"]
    return median | {
        "nbytes": nbytes, "first_call_s": first["call_s"], "rounds": later,
        "over_us": over_s / options.tensors * 1e6, "cpu_us": median["cpu_s"] / options.tensors * 1e6,
    }  # fmt: skip


def _save(checkpointer, step, gate):
    gate.clear()
    cpu_s, began = time.process_time(), time.perf_counter()
    pending = checkpointer.save(step)
    called_s = time.perf_counter() - began
    pending.local.result()
    found = {"call_s": called_s, "durable_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu_s}
    gate.set()
    pending.wait()
    checkpointer.wait()
    return found


def _table(console, result):
    row = result["measured"]
    table = Table(title="one save", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("save() s", "durable s", "least s", "overhead us/tensor", "CPU us/tensor", "goal us"):
        table.add_column(heading, justify="right")
    table.add_row(
        *(f"{row[name]:.3f}" for name in ("call_s", "durable_s", "least_s")),
        f"{row['over_us']:.1f}", f"{row['cpu_us']:.1f}", str(_GOAL_US),
    )  # fmt: skip
    console.print(table)


def main():
    """See above."""
    made = plain_parser(__doc__)
    made.add_argument("--tensors", type=int, default=100_000)
    made.add_argument("--kib", type=int, default=4, help="of each")
    made.add_argument("--rounds", type=int, default=LEAST_ROUNDS)
    options = made.parse_args()
    gate = threading.Event()
    with tempfile.TemporaryDirectory(prefix="dcpsvc-bench-") as name:
        told = {"tensors": options.tensors, "kib": options.kib, "rounds": options.rounds}
        result = {"facts": facts(name, told), "measured": measure(options, Path(name), gate)}
    write(options, result, lambda console: _table(console, result))


if __name__ == "__main__":
    main()
