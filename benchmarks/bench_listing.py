"""What it costs to list thousands of commits, with the reasons why each is there: as multiples of the plain LIST.

    python -m benchmarks.bench_listing --commits 1000,10000 --metrics 0.1 --rounds 5 --ceph

Commits of 8 ranks in a local directory, a share of them with metrics that came late; with ``--ceph`` the same once
more in a bucket of a real S3 server on this machine, of one rank each. Each round takes all measurements once, one
after the other; medians are told. ``manifests`` is the LIST of the manifests alone, which nobody can do without;
``data`` the LIST of all shards, which tells what is whole.
"""

import contextlib
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.table import Table

from benchmarks.common import ceph
from benchmarks.common.facts import facts
from benchmarks.common.options import plain_parser
from benchmarks.common.report import write
from benchmarks.common.rounds import say
from dcpsvc import choosing, keeping, sidefiles
from dcpsvc.format import keys, run
from dcpsvc.format.digest import digest, table_nbytes
from dcpsvc.format.keys import Epoch
from dcpsvc.format.manifest import LayoutRef, Manifest, ShardRecord
from dcpsvc.policies import Best, EveryHours, EveryNSteps, Latest
from dcpsvc.sidefiles import SideFiles
from dcpsvc.stages import discover
from dcpsvc.storage.open import open_store
from dcpsvc.storage.threads import at_once

EPOCH = Epoch(1, "deadbeef")
LAYOUT = b'{"format": 1, "aliases": {}, "tensors": {}}'
BODY_NBYTES, LOCAL_RANKS, CEPH_RANKS = 16, 8, 1
RULE = Latest(3) | Best(3, "eval", mode="min") | EveryNSteps(1000) | EveryHours(24)


def _shard(attempt, rank):
    nbytes = BODY_NBYTES + table_nbytes(BODY_NBYTES)
    return ShardRecord(rank=rank, path=attempt.shard(rank), nbytes=nbytes, body_nbytes=BODY_NBYTES, digest="ab" * 16)


def _fill(place, commits, share, ranks):
    """A run root as a job leaves it; written past the store, which would sync every file."""
    created = "2026-01-31T23:59:59Z"
    for key, data in {
        keys.RUN: run.Run(run_id="r1", created=created).dumps(),
        keys.layout(digest(LAYOUT)): LAYOUT,
    }.items():
        _put(place, key, data)
    every = round(1 / share) if share else 0
    for step in range(1, commits + 1):
        attempt = EPOCH.attempt(step, 0)
        shards = tuple(_shard(attempt, rank) for rank in range(ranks))
        manifest = Manifest(
            run_id="r1", step=step, attempt=attempt.attempt, created=created, shards=shards,
            layout=LayoutRef(digest=digest(LAYOUT), nbytes=len(LAYOUT)), metrics={"loss": 1.0 / step},
        )  # fmt: skip
        _put(place, attempt.manifest, manifest.dumps())
        for shard in shards:
            _put(place, shard.path, b"-" * shard.nbytes)
        if every and step % every == 0:
            record = sidefiles.sidefiles.Record(attempt=attempt, recorded=created, metrics={"eval": float(step % 97)})
            _put(place, attempt.record(1, "cafecafe"), record.dumps())


def _put(place, key, data):
    path = place / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _send(place, client, bucket, prefix):
    """Put a folder into a bucket."""
    files = [path for path in place.rglob("*") if path.is_file()]

    def put(path):
        client.put_object(Bucket=bucket, Key=f"{prefix}/{path.relative_to(place)}", Body=path.read_bytes())

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(put, files))


def _with_reasons(store):
    notes = SideFiles(store, readers=at_once(store))
    plan = keeping.plan(store, discover.look(store, notes, at_once=at_once(store)), notes, RULE)
    return len(plan.keep) + len(plan.remove)


MEASURED = {
    "LIST manifests": lambda store: len(store.list(keys.MANIFESTS)),
    "LIST data": lambda store: len(store.list(keys.DATA)),
    "committed()": lambda store: len(discover.committed(store)),
    "choose() newest": lambda store: int(choosing.choose(store, None).found is not None),
    "listing()": lambda store: len(discover.listing(store, at_once=at_once(store))),
    "listing() with reasons": _with_reasons,
}


def _measure(store, rounds):
    seconds = {name: [] for name in MEASURED}
    counts = {}
    for _ in range(rounds):
        for name, work in MEASURED.items():
            began = time.perf_counter()
            counts[name] = work(store)
            seconds[name].append(time.perf_counter() - began)
    return {name: (statistics.median(found), counts[name]) for name, found in seconds.items()}


def _draw(console, rows):
    table = Table(title="listing, in multiples of LIST manifests", box=None)
    for heading in ("where", "commits", "what", "found", "s", "x LIST manifests", "us a commit"):
        table.add_column(heading, justify="left" if heading in {"where", "what"} else "right")
    for row in rows:
        table.add_row(
            row["where"], f"{row['commits']:,}", row["what"], f"{row['found']:,}", f"{row['s']:.4f}",
            f"{row['ratio']:.1f}", f"{row['s'] / row['commits'] * 1e6:.0f}",
        )  # fmt: skip
    console.print(table)


@contextlib.contextmanager
def _filled(options, commits, ranks):
    place = Path(tempfile.mkdtemp(prefix="dcpsvc-listing-", dir=options.dir))
    try:
        _fill(place, commits, options.metrics, ranks)
        yield place
    finally:
        shutil.rmtree(place)


def _rows(where, commits, found):
    plain = found["LIST manifests"][0]
    return [
        {"where": where, "commits": commits, "what": name, "found": count, "s": s, "ratio": s / plain}
        for name, (s, count) in found.items()
    ]


def main():
    made = plain_parser(__doc__)
    made.add_argument("--commits", default="1000,10000")
    made.add_argument("--metrics", type=float, default=0.1, help="share of commits with metrics that came late")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--dir", default=None, help="where the run roots are made (default: the temporary directory)")
    made.add_argument("--ceph", action="store_true", help="in a bucket, too")
    options = made.parse_args()
    sizes = [int(commits) for commits in options.commits.split(",")]
    rows = []
    for commits in sizes:
        say(f"{commits:,} commits in a directory")
        with _filled(options, commits, LOCAL_RANKS) as place:
            rows += _rows("directory", commits, _measure(open_store(place), options.rounds))
    if options.ceph:
        with ceph.bucket() as (storage, bucket):
            for commits in sizes:
                say(f"{commits:,} commits in a bucket")
                with _filled(options, commits, CEPH_RANKS) as place:
                    _send(place, ceph.client(storage), bucket, f"run-{commits}")
                store = open_store(f"s3://{bucket}/run-{commits}", storage)
                rows += _rows("Ceph", commits, _measure(store, options.rounds))
    write(options, {"facts": facts(options.dir or tempfile.gettempdir(), {}), "rows": rows}, lambda c: _draw(c, rows))


if __name__ == "__main__":
    main()
