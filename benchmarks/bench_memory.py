"""How much host memory saving takes above the training's own, and whether it stays the same over 100 saves.

    python -m benchmarks.bench_memory --systems dcpsvc,dcp_thread_cached --saves 100

In multiples of the state, all ranks together, the helpers of a system included. One system runs at a time.

The C library is told to give large blocks back at once, to all systems alike. Otherwise training's own heap, of which
under DDP more than half is holes, grows by some hundredths of the state as soon as anybody allocates beside it.
"""

import functools
import os

from benchmarks.common.memory import memory
from benchmarks.common.options import parser
from benchmarks.common.report import Column, compare

COLUMNS = [Column("peak x state", "memory", 2, of_ours=True), Column("grown x state", "memory_grown", 3)]


TUNABLES = "GLIBC_TUNABLES"
FIXED = "glibc.malloc.mmap_threshold=1048576"


def main():
    os.environ.setdefault(TUNABLES, FIXED)
    made = parser(__doc__, rounds=0)
    made.add_argument("--saves", type=int, default=100)
    options = made.parse_args()
    compare(options, {}, COLUMNS, after=functools.partial(memory, saves=options.saves))


if __name__ == "__main__":
    main()
