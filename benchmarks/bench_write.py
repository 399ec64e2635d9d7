"""How long from ``save()`` until the bytes are on the local disk, against a raw O_DIRECT writer and the others.

    python -m benchmarks.bench_write --mib 1536 --rounds 5

Every file and directory is synced; every snapshot is read back and compared, the state changes right after the call.
"""

from benchmarks.common.derived import more
from benchmarks.common.options import parser
from benchmarks.common.report import Column, compare

COLUMNS = [
    Column("durable s", "durable_s", of_ours=True, limit="direct_s"),
    Column("GiB/s", "gib_per_s", 2),
    Column("first s", "first_durable_s"),
    Column("CPU s/GiB", "cpu_s_per_gib", 2, of_ours=True),
    Column("stall s", "stall_s"),
]

if __name__ == "__main__":
    compare(parser(__doc__).parse_args(), {"at_once": {}}, COLUMNS, derive=more)
