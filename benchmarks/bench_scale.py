"""What the ranks' talk costs at scale: plan, agree, layout, ack, manifest, commit, discovery, simulated in one process.

    python -m benchmarks.bench_scale --ranks 8,4096,16384 --tensors 1000,5000,100000

Every phase runs production code; ranks are simulated by calling it in their place, on a store in memory: no network,
and no tensors of size. Seconds are the coordinator's CPU time. Plan and layout are paid when the structure changes, the
others at every save; ``steady`` adds those up, with the bytes one rank sends and receives.
"""

from rich.table import Table

from benchmarks.common.facts import facts
from benchmarks.common.options import plain_parser
from benchmarks.common.report import write
from benchmarks.common.rounds import say
from benchmarks.common.simulation import Simulation


def _draw(console, rows):
    table = Table(title="simulated in one process", box=None)
    for heading in ("ranks", "tensors", "phase", "CPU s", "bytes", "peak MiB", "received"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for row in rows:
        head = [f"{row['ranks']:,}", f"{row['tensors']:,}", row["phase"]]
        received = f"{row['received_nbytes']:,}" if "received_nbytes" in row else ""
        table.add_row(*head, f"{row['s']:.3f}", f"{row['nbytes']:,}", f"{row['peak_mib']:.1f}", received)
    console.print(table)


def main():
    made = plain_parser(__doc__)
    made.add_argument("--ranks", default="8,512,4096,16384")
    made.add_argument("--tensors", default="1000,5000,100000")
    made.add_argument("--replicas", type=int, default=1, help="of each shard, as in HSDP, which divide its bytes")
    options = made.parse_args()
    rows = []
    for ranks in map(int, options.ranks.split(",")):
        for tensors in map(int, options.tensors.split(",")):
            say(f"{ranks} ranks x {tensors} tensors")
            rows += Simulation(ranks, tensors, options.replicas).run()
    write(options, {"facts": facts("/", {}), "rows": rows}, lambda console: _draw(console, rows))


if __name__ == "__main__":
    main()
