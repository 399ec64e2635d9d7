"""The selection behind ``make bench``: everybody who keeps up, on every question, in about ten minutes; one table.

    python -m benchmarks.bench --out benchmarks/results/fsdp2x1.json

All ratios are within this run. What each number means is said in the script of its question, ``bench_*.py``.
"""

import functools

from benchmarks.common.derived import more
from benchmarks.common.goals import goals
from benchmarks.common.memory import memory
from benchmarks.common.options import parser
from benchmarks.common.report import Column, compare

SELECTION = (
    "dcpsvc", "torch_save", "dcp", "dcp_thread_cached", "dcp_process_shm", "torchsnapshot", "torch_checkpointing",
    "nvrx", "dlrover",
)  # fmt: skip
SAVES = 3
COLUMNS = [
    Column("stall s", "stall_s", of_ours=True, limit="memcpy_s"),
    Column("first", "first_stall_s", 2),
    Column("visible s", "visible_s", of_ours=True),
    Column("added s", "added_s", 2, of_ours=True),
    Column("durable s", "durable_s", 2, of_ours=True, limit="direct_s"),
    Column("first", "first_durable_s", 2),
    Column("speed", "speed", 2),
    Column("memory", "memory", 2),
    Column("CPU s/GiB", "cpu_s_per_gib", 2, of_ours=True),
]

if __name__ == "__main__":
    compare(
        parser(__doc__, systems=SELECTION).parse_args(),
        {"at_once": {}, "training": {}},
        COLUMNS,
        derive=more,
        also=goals,
        after=functools.partial(memory, saves=SAVES),
    )
