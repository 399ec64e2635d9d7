"""What it costs to prove every byte before the model is touched: each way to read the same files, in one run.

    python -m benchmarks.bench_ceiling --mib 1024 --rounds 5 --json

All with as many threads as dcpsvc takes, into memory that is there already as a model's is, then into new memory as an
optimizer's state needs it. "read and hash" looks at each block right after it was read: a model that fails half way is
lost. "hash, then read" changes nothing before all is proven, and reads twice; "and hash" proves the second reading too,
as dcpsvc does. x plain: how fast, as a multiple of a plain read into the same kind of memory. Cold: the files' pages
are dropped from the page cache before.
"""

import contextlib
import functools
import logging
import mmap
import os
import shutil
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import xxhash

import dcpsvc
from benchmarks.bench_resume import PIECE, Model, compare, save, touched
from benchmarks.common.facts import facts
from benchmarks.common.lives import drop
from benchmarks.common.options import plain_parser
from benchmarks.common.report import write
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.storage.fetch import FILES_AT_ONCE

_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_HUGE_NBYTES = 2 << 20
_own = threading.local()


def whole(descriptor, begin, view):
    """A piece at once, and nothing else."""
    at = 0
    while at < len(view):
        at += os.preadv(descriptor, [view[at:]], begin + at)


def hashed(descriptor, begin, view):
    """A piece block by block, each looked at while it is in the processor's cache."""
    for at in range(0, len(view), BLOCK_NBYTES):
        block = view[at : at + BLOCK_NBYTES]
        whole(descriptor, begin + at, block)
        xxhash.xxh3_128_digest(block)


def proven(descriptor, begin, view):
    """Likewise, to memory of this thread, which stays there."""
    if not hasattr(_own, "scratch"):
        _own.scratch = memoryview(mmap.mmap(-1, BLOCK_NBYTES, flags=_PRIVATE))
    for at in range(0, len(view), BLOCK_NBYTES):
        hashed(descriptor, begin + at, _own.scratch[: min(BLOCK_NBYTES, len(view) - at)])


def read(memory, *ways):
    """All files, once in each way."""
    views = memory()
    descriptors = {path: os.open(path, os.O_RDONLY) for path in views}
    pieces = [
        (descriptors[path], at, view[at : at + PIECE])
        for path, view in views.items()
        for at in range(0, len(view), PIECE)
    ]
    for way in ways:
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            list(pool.map(way, *zip(*pieces, strict=True)))
    for descriptor in descriptors.values():
        os.close(descriptor)


def new(shards, *, huge):
    """Memory that nobody has touched."""
    views = {}
    for path in shards:
        nbytes = path.stat().st_size
        mapped = mmap.mmap(-1, nbytes + _HUGE_NBYTES, flags=_PRIVATE)
        mapped.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        begin = -torch.frombuffer(mapped, dtype=torch.uint8).data_ptr() % _HUGE_NBYTES
        views[path] = memoryview(mapped)[begin : begin + nbytes]
    return views


def ways(folder, model):
    """What is compared, by the plain read each belongs to."""
    root, other = folder / "root", folder / "dcp"
    save(root, model, folder)
    dcp.save({"model": model.state_dict()}, checkpoint_id=other, no_dist=True)
    shards = sorted((root / "data").rglob("*.safetensors"))
    there, state = touched(shards), {"model": model.state_dict()}
    small, large = (functools.partial(new, shards, huge=huge) for huge in (False, True))
    one = functools.partial
    return {
        "plain read": {
            "plain read": one(read, lambda: there, whole),
            "read and hash": one(read, lambda: there, hashed),
            "hash": one(read, lambda: there, proven),
            "hash, then read": one(read, lambda: there, proven, whole),
            "hash, then read and hash": one(read, lambda: there, proven, hashed),
            "dcpsvc": lambda: dcpsvc.load(root, {"model": model}),
            "DCP load": lambda: dcp.load(state, checkpoint_id=other, no_dist=True),
        },
        "plain read, new memory": {
            "plain read, new memory": one(read, small, whole),
            "read and hash, new memory": one(read, small, hashed),
            "read and hash, new huge pages": one(read, large, hashed),
        },
    }


def measure(options, folder):
    """Rows of each setting."""
    model = Model(options.mib)
    groups = ways(folder, model)
    systems = {name: way for group in groups.values() for name, way in group.items()}
    plain = {name: first for first, group in groups.items() for name in group}
    settings = {}
    for setting, before in (("warm", lambda: None), ("cold", lambda: drop(folder))):
        rows = compare(systems, options.rounds, model.nbytes, before)
        taken = {row["system"]: row["seconds"] for row in rows}
        settings[setting] = [row | {"x_plain": taken[plain[row["system"]]] / row["seconds"]} for row in rows]
    return settings


def draw(result, console):
    for title, rows in result["settings"].items():
        console.print(f"\n{title}\n{'':32}{'s':>8}{'GiB/s':>8}{'x plain':>9}{'memory x':>10}", highlight=False)
        for row in rows:
            numbers = f"{row['seconds']:8.3f}{row['gib_per_s']:8.2f}{row['x_plain']:9.2f}{row['memory']:10.2f}"
            console.print(f"{row['system']:32}{numbers}", highlight=False)


def main():
    made = plain_parser(__doc__)
    made.add_argument("--mib", type=int, default=1024, help="of model (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=5, help="of which the medians are (default: %(default)s)")
    made.add_argument("--dir", default=None, help="where files are (default: the temporary directory)")
    options = made.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("dcpsvc").setLevel(logging.ERROR)  # each load() would say that it has no local tier
    folder = Path(tempfile.mkdtemp(prefix="ceiling-", dir=options.dir))
    with contextlib.ExitStack() as after:
        after.callback(shutil.rmtree, folder, ignore_errors=True)
        result = {"facts": facts(folder, {"mib": options.mib, "rounds": options.rounds, "threads": FILES_AT_ONCE})}
        result["settings"] = measure(options, folder)
        write(options, result, functools.partial(draw, result))


if __name__ == "__main__":
    main()
