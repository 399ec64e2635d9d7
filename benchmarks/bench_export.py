"""Checkpoints in and out of foreign formats: time and memory, beside what loading the model and saving it takes.

    python -m benchmarks.bench_export --mib 2048 --rounds 3 --out benchmarks/results/export.json

Every run is a process of its own, which has not the model but where it is loaded: `load + ...`. Memory: the peak of
what is resident and belongs to no file (RssAnon, sampled every 10 ms), above what the process had before, in MiB and in
multiples of the largest file; pages of files that are mapped are the kernel's to take back, and are in `with files`.
Importing torch is about 130 MiB of it. All have their files on the disk (fsync) at the end. dcpsvc proves every byte.
"""

import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

from benchmarks.common.facts import facts
from benchmarks.common.options import plain_parser
from benchmarks.common.report import write

MIB = 2**20
SMALL_MIB = 256
EVERY_S = 0.01


def build(folder, mib):
    """A checkpoint of ours, and the same model in each foreign format."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file

    import dcpsvc

    model = _model(mib)
    with dcpsvc.Checkpointer(folder / "root", {"model": model}, local=folder / "nvme", save_last=False) as ckpt:
        ckpt.save(1).wait(600)
    shutil.rmtree(folder / "nvme")
    (folder / "hf").mkdir()
    save_file(model.state_dict(), folder / "hf" / "model.safetensors")
    torch.save(model.state_dict(), folder / "model.pt")
    dcp.save(model.state_dict(), checkpoint_id=folder / "dcp", no_dist=True)


def _model(mib):
    from benchmarks.bench_resume import Model

    return Model(mib)


def _loaded(folder, mib):
    """What a script does that has no exporter."""
    import dcpsvc

    model = _model(mib)
    dcpsvc.load(folder / "root", {"model": model})
    return model.state_dict()


def _synced(path):
    for file in [path] if path.is_file() else path.rglob("*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _load_and_save_file(folder, out, mib):
    from safetensors.torch import save_file

    out.mkdir()
    save_file(_loaded(folder, mib), out / "model.safetensors")
    _synced(out)


def _load_and_torch_save(folder, out, mib):
    import torch

    out.mkdir()
    torch.save(_loaded(folder, mib), out / "model.pt")
    _synced(out)


def _load_and_dcp_save(folder, out, mib):
    import torch.distributed.checkpoint as dcp

    dcp.save(_loaded(folder, mib), checkpoint_id=out, no_dist=True)
    _synced(out)


def _command(*arguments):
    from dcpsvc.cli import cli

    cli([str(argument) for argument in arguments], standalone_mode=False)


def _export(kind, *options):
    return lambda folder, out, _: _command("export", folder / "root", 1, out, "--format", kind, *options)


def _import(source, *options):
    return lambda folder, out, _: _command("import", folder / source, out, *options)


SYSTEMS = {
    "export hf": _export("hf"),
    f"export hf, files of {SMALL_MIB} MiB": _export("hf", "--max-shard-mib", SMALL_MIB),
    "export hf, to bfloat16": _export("hf", "--dtype", "BF16"),
    "load + safetensors save_file": _load_and_save_file,
    "export torch": _export("torch"),
    "load + torch.save": _load_and_torch_save,
    "export dcp": _export("dcp"),
    "load + dcp.save": _load_and_dcp_save,
    "import hf": _import("hf"),
    f"import hf, shards of {SMALL_MIB} MiB": _import("hf", "--max-shard-mib", SMALL_MIB),
    "import torch": _import("model.pt"),
    "import dcp": _import("dcp"),
}


def _status():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return [int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS")]


def once(name, folder, mib):
    """In this process; prints JSON."""
    warnings.simplefilter("ignore")
    out = folder / "out"
    peaks, done = _status(), threading.Event()
    before = list(peaks)

    def watch():
        while not done.wait(EVERY_S):
            peaks[:] = map(max, peaks, _status())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.perf_counter()
    SYSTEMS[name](folder, out, mib)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    files = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    found = {"seconds": seconds, "anon_nbytes": peaks[0] - before[0], "rss_nbytes": peaks[1] - before[1]}
    print(json.dumps(found | {"largest_nbytes": max(files), "nbytes": sum(files)}))


def measured(name, folder, mib):
    """In a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_export", "--one", name, "--dir", str(folder), "--mib", str(mib)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(folder / "out", ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder, mib, rounds):
    """Systems take turns; building has warmed the page cache for all."""
    taken = {name: [] for name in SYSTEMS}
    for number in range(rounds):
        for name, runs in taken.items():
            runs.append(measured(name, folder, mib))
            print(f"round {number + 1}: {name}: {runs[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    rows = []
    for name, runs in taken.items():
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        row |= {"system": name, "gib_per_s": mib / 1024 / row["seconds"]}
        rows.append(row | {"anon_x_largest": row["anon_nbytes"] / row["largest_nbytes"]})
    return rows


def draw(result, console):
    """A table."""
    heads = ("s", "GiB/s", "memory MiB", "x largest", "with files")
    console.print(f"\n{'system':34}" + "".join(f"{head:>12}" for head in heads), highlight=False)
    for row in result["rows"]:
        mib = [row["anon_nbytes"] / MIB, row["anon_x_largest"], row["rss_nbytes"] / MIB]
        numbers = f"{row['seconds']:12.2f}{row['gib_per_s']:12.2f}{mib[0]:12.0f}{mib[1]:12.2f}{mib[2]:12.0f}"
        console.print(f"{row['system']:34}{numbers}", highlight=False)


def main():
    made = plain_parser(__doc__)
    made.add_argument("--mib", type=int, default=2048, help="of model (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=3, help="of which the medians are (default: %(default)s)")
    made.add_argument("--dir", default=None, help="where files are (default: the temporary directory)")
    made.add_argument("--one", choices=list(SYSTEMS), default=None, help="only this, in this process")
    options = made.parse_args()
    if options.one:
        once(options.one, Path(options.dir), options.mib)
        return
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="export-", dir=options.dir))
    with contextlib.ExitStack() as after:
        after.callback(shutil.rmtree, folder, ignore_errors=True)
        build(folder, options.mib)
        result = {"facts": facts(folder, {"mib": options.mib, "rounds": options.rounds})}
        result["rows"] = compare(folder, options.mib, options.rounds)
        write(options, result, functools.partial(draw, result))


if __name__ == "__main__":
    main()
