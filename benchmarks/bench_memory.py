"""How much host memory saving takes above the training's own, and whether it stays the same over 100 saves.

    python -m benchmarks.bench_memory --systems dcpsvc,dcp_thread_cached --saves 100

In multiples of the state, all ranks together, the helpers of a system included. One system runs at a time.
"""

import functools

from benchmarks.common.memory import memory
from benchmarks.common.options import parser
from benchmarks.common.report import Column, compare

COLUMNS = [Column("peak x state", "memory", 2, of_ours=True), Column("grown x state", "memory_grown", 3)]


def main():
    made = parser(__doc__, rounds=0)
    made.add_argument("--saves", type=int, default=100)
    options = made.parse_args()
    compare(options, {}, COLUMNS, after=functools.partial(memory, saves=options.saves))


if __name__ == "__main__":
    main()
