"""What the kernel says about a process and everything it started. No torch."""

import os
import threading
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


def tree(root=None):
    """A process and its descendants that live now."""
    children = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(entry.name)):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root or os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found


def tree_cpu_s():
    """CPU seconds of this process and its descendants, those that have ended and were waited for included."""
    stats = (_stat(pid) for pid in tree())
    return sum(sum(map(int, fields[11:15])) for fields in stats if fields) / _TICKS_PER_S


def tree_pss_nbytes(roots):
    """Host memory of processes and their descendants; shared pages are counted once in all."""
    return sum(_pss_nbytes(pid) for root in roots for pid in tree(root))


class PeakMemory:
    """Samples host memory while the block runs.

    Attributes:
        samples: Bytes, in order.
    """

    def __init__(self, roots, every_s=0.05):
        self.samples = [tree_pss_nbytes(roots)]
        self._roots, self._every_s = roots, every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _sample(self):
        while not self._done.wait(self._every_s):
            self.samples.append(tree_pss_nbytes(self._roots))


def _stat(pid):
    """Fields of ``/proc/<pid>/stat`` after the command's name: state, parent, ..."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return None


def _pss_nbytes(pid):
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
