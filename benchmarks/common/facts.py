"""Which machine, which versions, which commit: a number means nothing without them."""

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path


def facts(directory, settings):
    """Everything a reader needs to judge a result, or to repeat it."""
    return {
        "command": shlex.join(["python", "-m", *_module(), *_told(sys.argv[1:])]),
        "commit": _commit(),
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory_gib": round(int(_field("/proc/meminfo", "MemTotal").split()[0]) / 2**20, 1),
        "file_system": _file_system(directory),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "load_before": round(os.getloadavg()[0], 2),
        **settings,
    }


def _told(arguments):
    """What matters to a reader: not where something was written."""
    places = {at + ahead for at, each in enumerate(arguments) if each in {"--out", "--dir"} for ahead in (0, 1)}
    return [each for at, each in enumerate(arguments) if at not in places]


def _module():
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name] if spec else [Path(sys.argv[0]).name]


def _commit():
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    measured = [":/", *(f":(top,exclude){path}" for path in ("benchmarks/results", "docs", "*.md"))]
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno", "--", *measured], capture_output=True, text=True, check=False
    ).stdout
    return (head.strip() or "unknown") + (" with changes" if changed.strip() else "")


def _field(path, name):
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "0 unknown")


def _file_system(directory):
    """Type and device of the mount a directory is on."""
    place = os.path.realpath(directory)
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    below = [mount for mount in mounts if os.path.commonpath([place, mount[1]]) == mount[1]]
    device, _, kind, *_ = max(below, key=lambda mount: len(mount[1]))
    return f"{kind} on {device}"
