"""What the first save of a process costs, against the tenth.

    python -m benchmarks.bench_first_save --systems dcpsvc,dcp_thread_cached,dcp_process_shm

Each round starts all processes anew. What a system offers to warm up (ours: ``prepare()``) is called before.
"""

from benchmarks.common.options import parser
from benchmarks.common.report import Column, compare

SAVES = 10
COLUMNS = [
    Column("first call s", "first_blocked_s"),
    Column("tenth call s", "tenth_blocked_s", of_ours=True),
    Column("first/tenth", "blocked_ratio", 2),
    Column("first durable s", "first_durable_s"),
    Column("tenth durable s", "tenth_durable_s", of_ours=True),
    Column("first/tenth", "durable_ratio", 2),
]


def derive(row):
    """First and last of each list."""
    for name in ("blocked", "durable"):
        first, *_, tenth = row[f"{name}_s"]
        row |= {f"first_{name}_s": first, f"tenth_{name}_s": tenth, f"{name}_ratio": first / tenth}
    return row


if __name__ == "__main__":
    compare(parser(__doc__).parse_args(), {"saves": {"count": SAVES}}, COLUMNS, derive=derive, fresh=True)
