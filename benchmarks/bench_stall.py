"""How much training time a checkpoint costs: in the call, in the step after it, and over a whole loop.

    python -m benchmarks.bench_stall --settings fsdp2x1,fsdp2x2,ddpx2

stall: the call, and what the optimizer step right after it takes longer. visible: the same where a forward and backward
pass lies between them. added: wall time a loop loses by one checkpoint until it is on disk.
"""

from benchmarks.common.derived import more
from benchmarks.common.options import parser
from benchmarks.common.report import Column, compare

COLUMNS = [
    Column("call s", "blocked_s"),
    Column("next step +", "next_s"),
    Column("stall s", "stall_s", of_ours=True, limit="memcpy_s"),
    Column("visible s", "visible_s", of_ours=True),
    Column("added s", "added_s", of_ours=True),
    Column("of CPU/cores", "added_of_cpu", 2),
    Column("CPU s/GiB", "cpu_s_per_gib", 2, of_ours=True),
]

if __name__ == "__main__":
    compare(parser(__doc__).parse_args(), {"at_once": {}, "training": {}}, COLUMNS, derive=more)
