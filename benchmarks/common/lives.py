"""A model with Adam that comes back from the disk of its node, each time in a new process, as after a crash."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common.life import LIVES

MIB = 2**20
ROOT = Path(__file__).parents[2]


def local_tier(options, folder):
    """Medians of each way to come back, from files in memory and from those that are not."""
    lived(folder, "save", options.mib)
    settings = {}
    for setting, before in (("warm", lambda: None), ("cold", lambda: drop(folder))):
        taken = {system: [] for system in LIVES}
        for _ in range(options.rounds):
            for system, runs in taken.items():
                before()
                runs.append(lived(folder, system, options.mib))
        ours = {key: statistics.median(run[key] for run in taken["dcpsvc"]) for key in ("seconds", "start_s")}
        settings |= {
            f"resume, local tier, {setting}": rows_of(taken, "seconds", ours),
            f"from process start, {setting}": rows_of(taken, "start_s", ours),
        }
    return settings


def from_s3(options, folder, root, storage_options):
    """A node whose disk has nothing: memory, and bytes fetched for each one needed."""
    there = {"DCPSVC_BENCH_ROOT": json.dumps([root, storage_options])}
    lived(folder, "save", options.mib, there)
    runs = []
    for _ in range(options.rounds):
        shutil.rmtree(folder / "nvme")
        runs.append(lived(folder, "dcpsvc", options.mib, there))
    ours = {"seconds": statistics.median(run["seconds"] for run in runs)}
    rows = rows_of({"dcpsvc": runs}, "seconds", ours)
    rows[0]["fetched"] = statistics.median(run["from_root_nbytes"] for run in runs) / runs[0]["nbytes"]
    return {"resume, S3, empty disk": rows}


def rows_of(taken, key, ours):
    rows = []
    for system, runs in taken.items():
        seconds = statistics.median(run[key] for run in runs)
        nbytes, over = runs[0]["nbytes"], statistics.median(run["over_nbytes"] for run in runs)
        rows.append({
            "system": system, "seconds": seconds, "x_ours": seconds / ours[key], "gib_per_s": nbytes / 2**30 / seconds,
            "memory": over / nbytes, "over_mib": over / MIB, "open_s": statistics.median(run["open_s"] for run in runs),
        })  # fmt: skip
    return rows


def lived(folder, system, mib, more=None):
    command = [sys.executable, "-m", "benchmarks.common.life", system, str(folder), str(mib), str(time.time())]
    env = os.environ | (more or {})
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def drop(folder):
    for path in Path(folder).rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
