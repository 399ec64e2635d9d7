"""What a benchmark asks of a system that saves checkpoints."""

import contextlib
import os
import shutil
import threading
import time
from pathlib import Path


class System:
    """One way to save, on one rank. Every method is called on all ranks alike, on the training thread.

    Args:
        workload: The state.
        directory: For its files, shared by the ranks.

    Attributes:
        background: Whether it works on after ``save`` has returned.
        durable_at: When the newest save was on disk, on the performance counter; None where nobody knows yet.
    """

    background = True

    def __init__(self, workload, directory):
        self.workload, self.directory = workload, Path(directory)
        self.durable_at = None

    def path(self, step):
        """Where one save goes."""
        return self.directory / f"step-{step}"

    def save(self, step):
        """Return when training may go on."""
        raise NotImplementedError

    def guard(self):
        """Around every change of the state: systems that copy beside the training hold it back until they have."""
        return contextlib.nullcontext()

    def wait(self):
        """Until the save is written, with all that the system itself does for that."""

    def durable(self):
        """Until it is on disk: whoever does not fsync files or directories has it done here."""
        self.wait()
        fsync_tree(self.directory)

    def watch(self):
        """A function that says, at any time and without waiting, whether the newest save is on disk."""
        thread = threading.Thread(target=self._durable, daemon=True)
        self.durable_at = None
        thread.start()
        return lambda: not thread.is_alive()

    def finish(self, step):
        """Whatever it does after that; never measured."""

    def load(self, step):
        """Read a save back into the live state."""
        raise NotImplementedError

    def discard(self, step):
        """Make room."""
        if self.workload.rank == 0:
            shutil.rmtree(self.path(step), ignore_errors=True)

    def close(self):
        """End every thread and process."""

    def _durable(self):
        self.durable()
        self.durable_at = time.perf_counter()


def fsync_tree(directory):
    """Every file and directory; costs nothing where that was done before."""
    for path in [directory, *directory.rglob("*")]:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:  # a temporary file that is gone, or a socket
            continue
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
