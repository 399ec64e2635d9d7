"""What this machine allows: memcpy into touched memory, a raw O_DIRECT writer with fsync, XXH3-128."""

import mmap
import os
import threading
import time
from pathlib import Path

import numpy as np
import xxhash

_BLOCK_NBYTES = 16 << 20


class Limits:
    """Measures the limits again and again, with memory that is touched once.

    Args:
        share_nbytes: What one rank writes.
        ranks: How many do so at the same time.
        directory: Where files are written.
    """

    def __init__(self, share_nbytes, ranks, directory):
        self._share_nbytes = -(-share_nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._directory = Path(directory)
        self._buffers = [mmap.mmap(-1, self._share_nbytes) for _ in range(ranks)]  # page-aligned, as O_DIRECT asks
        self._targets = [np.frombuffer(buffer, dtype=np.uint8) for buffer in self._buffers]
        self._sources = [_random(self._share_nbytes) for _ in range(ranks)]  # no cache helps, as with states
        self._together(self._copy)

    def measure(self):
        """Seconds for the whole state, by all ranks at once; a core's hash alone."""
        os.sync()
        self._together(self._copy)  # memory that was idle for a while may have been taken back
        return {
            "memcpy_s": self._together(self._copy),
            "direct_s": self._together(self._write),
            "hash_s": self._hash(),
        }

    def copy_cpu_s(self):
        """Processor time of that memcpy."""
        began = time.process_time()
        self._together(self._copy)
        return time.process_time() - began

    def _copy(self, number):
        np.copyto(self._targets[number], self._sources[number])

    def _write(self, number):
        path = self._directory / f"raw-{number}"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        except OSError:  # tmpfs, some overlays
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, self._share_nbytes)
            view = memoryview(self._buffers[number])
            for begin in range(0, self._share_nbytes, _BLOCK_NBYTES):
                os.pwrite(descriptor, view[begin : begin + _BLOCK_NBYTES], begin)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _hash(self):
        began = time.perf_counter()
        for target in self._targets:
            xxhash.xxh3_128(target).digest()
        return time.perf_counter() - began

    def _together(self, work):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(self._buffers))]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
        for path in self._directory.glob("raw-*"):
            path.unlink()
        return seconds


def _random(nbytes):
    """Bytes in memory of their own."""
    return np.resize(np.random.default_rng(0).integers(0, 255, _BLOCK_NBYTES, dtype=np.uint8), nbytes)
