"""How fast training runs while a save goes on in the background; 1.00 is undisturbed.

    python -m benchmarks.bench_interference --settings fsdp2x1,fsdp2x1t1,fsdp2x2

From the return of ``save()`` until the checkpoint is on disk. What blocks (``torch.save``, ``dcp.save``) has no
background: its cost is in ``added``. Where training fills all cores, whatever the save computes is taken from it.
"""

from benchmarks.common.options import parser
from benchmarks.common.report import Column, compare

COLUMNS = [
    Column("step s", "step_s"),
    Column("speed during", "speed", 2),
    Column("visible s", "visible_s", of_ours=True),
    Column("added s", "added_s", of_ours=True),
]

if __name__ == "__main__":
    compare(parser(__doc__).parse_args(), {"training": {}}, COLUMNS)
