"""What a job of two ranks asks an S3 server for: requests by kind, counted between the job and a real server.

    python -m benchmarks.bench_requests --out benchmarks/results/requests.json

A job opens a fresh run, saves six times and closes; a second start on other disks resumes, saves once and closes.
Counted are all requests of both ranks, for each of these: ``steady`` is the median of the last three saves, with a
policy that deletes one old checkpoint after each. Shards are of 48 MiB: three parts of 16 MiB and one with the rest.
"""

import argparse
import collections
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from rich.table import Table

from benchmarks.common import ceph
from benchmarks.common.facts import facts
from benchmarks.common.options import plain_parser
from benchmarks.common.report import write
from tests.s3.spoiling import Proxy, says

MIB = 2**20
SAVES = 6
STEADY = 3
RANKS = 2


def kind(line):
    """What S3 calls a request, and what it is about."""
    method, _, rest = line.partition(" ")
    parts = urlsplit(rest.removesuffix(" copy"))
    query = parse_qs(parts.query, keep_blank_values=True)
    key = unquote(parts.path).split("/", 3)  # '', bucket, prefix, below
    below = key[3] if len(key) > 3 else query.get("prefix", ["/"])[0].partition("/")[2]
    about = below.partition("/")[0] or "(all)"
    return f"{_operation(method, query, copied=line.endswith(' copy'))} {about}"


def _operation(method, query, *, copied):
    if "uploadId" in query:
        names = {"POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload", "GET": "ListParts"}
        return names.get(method, "UploadPartCopy" if copied else "UploadPart")
    if "uploads" in query:
        return "CreateMultipartUpload" if method == "POST" else "ListMultipartUploads"
    if method == "GET" and ("list-type" in query or "prefix" in query):
        return "ListObjectsV2"
    names = {"GET": "GetObject", "PUT": "PutObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}
    return names.get(method, "DeleteObjects")


def phases(lines):
    """Requests by kind, for each phase that was marked."""
    found, name = collections.defaultdict(collections.Counter), ""
    for line in lines:
        if line.startswith("GET /mark/"):
            name = line.removeprefix("GET /mark/")
        elif name:
            found[name][kind(line)] += 1
    return found


def summary(found):
    """The phases that people ask about; what several saves do alike as a median."""
    last = [found[f"save {step}"] for step in range(SAVES - STEADY + 1, SAVES + 1)]
    steady = {name: statistics.median(one[name] for one in last) for name in sorted(set().union(*last))}
    named = {
        "open": found["open"], "first save": found["save 1"], "second save": found["save 2"], "steady save": steady,
        "close": found["close"], "open and resume": found["resume"], "save after it": found["save 7"],
    }  # fmt: skip
    return {name: dict(sorted((key, count) for key, count in one.items() if count)) for name, one in named.items()}


def rank():
    """One rank of either job; started by torchrun."""
    import torch
    import torch.distributed as dist

    import dcpsvc

    given = json.loads(os.environ["BENCH_REQUESTS"])
    dist.init_process_group("gloo")
    number = dist.get_rank()
    generator = torch.Generator().manual_seed(number)
    values = torch.randint(0, 256, (48 * MIB,), dtype=torch.uint8, generator=generator)
    state = {"w": dcpsvc.PerRank({"values": values})}

    def mark(name):
        dist.barrier()
        if number == 0:
            urllib.request.urlopen(f"{given['endpoint']}/mark/{name.replace(' ', '+')}").close()  # noqa: S310
        dist.barrier()

    mark("resume" if given["again"] else "open")
    with dcpsvc.Checkpointer(
        given["root"], state, local=given["local"], storage_options=given["options"], save_last=False,
        keep=dcpsvc.Latest(2),
    ) as ckpt:  # fmt: skip
        ckpt.resume()
        for step in range(SAVES + 1, SAVES + 2) if given["again"] else range(1, SAVES + 1):
            mark(f"save {step}")
            if not given["frozen"]:
                values.add_(1)
            ckpt.save(step).wait(300)
            ckpt.wait(300)
        mark("close")
    mark("over")
    dist.destroy_process_group()


def job(proxy, options, bucket, folder, *, again, frozen):
    given = {
        "endpoint": proxy.endpoint,
        "root": f"s3://{bucket}/run{int(frozen)}",
        "local": str(folder / f"local-{again}-{frozen}"),
        "options": {**options, "endpoint_url": proxy.endpoint},
        "again": again,
        "frozen": frozen,
    }
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--standalone",
         "-m", "benchmarks.bench_requests", "--rank"],
        check=True, timeout=600, env={**os.environ, "BENCH_REQUESTS": json.dumps(given), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def measure(options, bucket, folder, *, frozen):
    with Proxy(options["endpoint_url"]) as proxy:
        proxy.spoil("^GET /mark/", says(204, ""), 1000)
        for again in (False, True):
            job(proxy, options, bucket, folder, again=again, frozen=frozen)
        return summary(phases([line.replace("+", " ") if "/mark/" in line else line for line in proxy.seen]))


def draw(result, console):
    for title, found in result["settings"].items():
        table = Table(title=title)
        for heading in ("request", *found):
            table.add_column(heading, justify="left" if heading == "request" else "right")
        for name in sorted(set().union(*found.values())):
            table.add_row(name, *(f"{one.get(name, 0):g}" for one in found.values()))
        table.add_row("all", *(f"{sum(one.values()):g}" for one in found.values()))
        console.print(table)


def main():
    made = plain_parser(__doc__)
    made.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--endpoint", default=None, help="of a server of yours; keys in DCPSVC_TEST_S3_KEY and _SECRET")
    made.add_argument("--dir", default=None, help="where files and the server's data are (default: temporary)")
    options = made.parse_args()
    if options.rank:
        rank()
        return
    with tempfile.TemporaryDirectory(prefix="requests-", dir=options.dir) as folder:
        result = {"facts": facts(Path(folder), {"ranks": RANKS, "saves": SAVES}), "settings": {}}
        with ceph.bucket(options.endpoint, options.dir) as (storage_options, bucket):
            for title, frozen in (("all changes", False), ("all but the header is unchanged", True)):
                result["settings"][title] = measure(storage_options, bucket, Path(folder), frozen=frozen)
        write(options, result, functools.partial(draw, result))


if __name__ == "__main__":
    main()
