"""Where the processor time of one save goes, by kind of work, with nothing beside it: perf looks on.

    python -m benchmarks.bench_profile --settings fsdp2x1,fsdp2x2,ddpx2

Only from the call until the shards are on the local disks, all ranks together. Beside it the least there is: what a
copy into touched memory and one checksum of the same bytes take. Needs ``perf`` (Linux).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.common.crew import Crew
from benchmarks.common.facts import facts
from benchmarks.common.limits import Limits
from benchmarks.common.options import parser
from benchmarks.common.report import write
from benchmarks.peers import OURS, SYSTEMS

_PERF = shutil.which("perf") or ""
_HERTZ = 1999
_KINDS = {  # by symbol first, then by the library it is in
    "copies": r"memmove|memcpy|foreach_copy|copy_kernel",
    "checksums": r"XXH",
    "new memory": r"clear_page|clear_huge|folio_zero|page_fault|do_anonymous|folio_alloc|page_from_freelist",
    "the kernel, writing and waiting": r"kernel|vdso",
    "Python": r"python|_PyEval|_xxhash|_json|_struct",
    "torch": r"torch|c10|gloo",
}
_END_S = 60


def profile(options, setting):
    """CPU seconds of one save by kind of work, the mean of all rounds."""
    with tempfile.TemporaryDirectory(prefix="dcpsvc-bench-", dir=options.dir) as directory:
        crew = Crew(SYSTEMS[OURS], setting, options.mib, directory)
        try:
            crew.ready()
            crew.do("profiled", count=1)  # the first pays for what all others use
            data, switch = Path(directory) / "perf.data", Path(directory) / "switch"
            seconds = _recorded(crew, data, switch, options.rounds)
        finally:
            crew.end()
        limits = Limits(crew.nbytes // setting.ranks, setting.ranks, directory)
        least = {"copies": limits.copy_cpu_s(), "checksums": limits.measure()["hash_s"]}
        return _row(_symbols(data), crew.nbytes, options.rounds, seconds, least)


def _recorded(crew, data, switch, count):
    os.mkfifo(switch)
    pids = ",".join(map(str, crew.pids))
    how = ["-q", "-F", str(_HERTZ), "-D", "-1", f"--control=fifo:{switch}", "-p", pids, "-o", str(data)]
    perf = subprocess.Popen([_PERF, "record", *how])
    try:
        return crew.do("profiled", count=count, switch=str(switch))["durable_s"]
    finally:
        perf.terminate()
        perf.wait(_END_S)


def _symbols(data):
    """(CPU seconds, library, symbol)."""
    listed = subprocess.run(
        [_PERF, "report", "-i", str(data), "--stdio", "-q", "--no-children", "-F", "period,dso,symbol", "-t", "|"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    rows = [line.split("|", 2) for line in listed.splitlines() if line.count("|") >= 2]
    return [
        (int(period) / 1e9, dso.strip(), symbol.strip()) for period, dso, symbol in rows if period.strip().isdigit()
    ]


def _row(symbols, nbytes, count, seconds, least):
    found = dict.fromkeys([*_KINDS, "else"], 0.0)
    for cpu_s, dso, symbol in symbols:
        found[_kind(dso, symbol)] += cpu_s / count
    top = sorted(((cpu_s / count, dso, symbol) for cpu_s, dso, symbol in symbols), reverse=True)[:15]
    return {
        "nbytes": nbytes, "durable_s": seconds, "cpu_s": sum(found.values()), "kinds": found, "least": least,
        "symbols": [{"cpu_s": round(s, 5), "in": Path(dso).name, "symbol": symbol} for s, dso, symbol in top],
    }  # fmt: skip


def _kind(dso, symbol):
    for text in (symbol, dso):
        for kind, pattern in _KINDS.items():
            if re.search(pattern, text):
                return kind
    return "else"


def _tables(console, result):
    for setting, row in result["settings"].items():
        table = Table(title=f"{setting}: one save, {row['cpu_s']:.3f} CPU s", box=SIMPLE_HEAD, pad_edge=False)
        for heading in ("work", "CPU s", "share", "least"):
            table.add_column(heading, justify="left" if heading == "work" else "right")
        least = row["least"]
        for kind, cpu_s in row["kinds"].items():
            bound = f"{least[kind]:.3f}" if kind in least else "-"
            table.add_row(kind, f"{cpu_s:.3f}", f"{cpu_s / row['cpu_s']:.0%}", bound)
        console.print(table)


def main():
    """See above."""
    options = parser(__doc__).parse_args()
    if not _PERF:
        sys.exit("perf is not installed (Debian: linux-perf)")
    result = {"facts": facts(options.dir or tempfile.gettempdir(), {"mib": options.mib, "rounds": options.rounds})}
    result["settings"] = {str(setting): profile(options, setting) for setting in options.settings}
    write(options, result, lambda console: _tables(console, result))


if __name__ == "__main__":
    main()
