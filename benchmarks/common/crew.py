"""All ranks of one system, as processes on this machine."""

import contextlib
import json
import os
import random
import select
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.common.process import PeakMemory

_ROOT = Path(__file__).parents[2]
_START_S = 180
_END_S = 60
_CLEAN_UP_S = 5
_LOOK_S = 0.05
_TAIL = 1500


class CrewError(Exception):
    """A system did not work here: why."""


class Crew:
    """Starts the ranks, tells all of them the same, and makes one answer of theirs.

    Args:
        entry: Of :data:`benchmarks.peers.SYSTEMS`.
        setting: How the state is shared, and by how many.
        mib: Of state.
        directory: For files.

    Attributes:
        pids: Of the ranks.
        nbytes: Of the whole state.
        base_nbytes: Host memory that the training alone takes at its peak, all ranks.
    """

    def __init__(self, entry, setting, mib, directory):
        self._place = Path(tempfile.mkdtemp(prefix="bench-", dir=directory))
        self._log = (self._place.with_suffix(".log")).open("w+")
        port = _free_port()
        pipes = [os.pipe() for _ in range(setting.ranks)]
        spec = {
            "kind": setting.kind, "threads": setting.threads, "mib": mib, "module": entry.module,
            "options": entry.options, "directory": str(self._place),
        }  # fmt: skip
        self._ranks = [
            _start(entry.python, spec | {"answers": pipe[1]}, _environment(rank, setting.ranks, port), self._log)
            for rank, pipe in enumerate(pipes)
        ]
        for _, write in pipes:
            os.close(write)
        self._answers = [os.fdopen(read) for read, _ in pipes]
        self.pids = [rank.pid for rank in self._ranks]
        self._step = 0
        try:
            self.nbytes = self._hear(_START_S)[0]["nbytes"]
            with PeakMemory(self.pids) as peak:
                self._tell({})
                self._hear(_START_S)
        except (CrewError, OSError):
            self.kill()
            raise
        self.base_nbytes = max(peak.samples)

    def ready(self):
        """Set the system up; whatever it takes for that counts as its own."""
        self._tell({})
        self._hear(_START_S)

    def do(self, exercise, timeout_s=240, **told):
        """Run one exercise on all ranks; see :func:`_together`."""
        self._step += 1
        self._tell({"exercise": exercise, "step": self._step, **told})
        self._step += told.get("count", 0)
        return _together(self._hear(timeout_s))

    def end(self):
        """Close the system and remove its files; what does not end by itself is killed."""
        with contextlib.suppress(CrewError, OSError):
            for rank in self._ranks:
                rank.stdin.close()
            self._hear(_END_S)
        self.kill()

    def kill(self):
        """End the ranks and whatever they started. What cleans up after Python's processes outlives a SIGTERM."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            ends, alive = time.monotonic() + _CLEAN_UP_S, [*self._ranks]
            while alive and time.monotonic() < ends:
                alive = [rank for rank in alive if _signal(rank, sign)]
                time.sleep(_LOOK_S)
        for answers in self._answers:
            answers.close()
        self._log.close()
        subprocess.run(["rm", "-rf", self._place, self._log.name], check=True)  # noqa: S607

    def _tell(self, told):
        for rank in self._ranks:
            rank.stdin.write(json.dumps(told) + "\n")
            rank.stdin.flush()

    def _hear(self, timeout_s):
        """One answer of each rank."""
        ends = time.monotonic() + timeout_s
        heard = [_read(answers, ends) for answers in self._answers]
        errors = [answer["error"] for answer in heard if "error" in answer]
        if errors:
            self._log.seek(0)
            raise CrewError(f"{errors[0].strip().splitlines()[-1]}\n{errors[0]}\n{self._log.read()[-_TAIL:]}")
        return heard


def _signal(rank, sign):
    """To a rank and all it started; says whether somebody of them still lives."""
    rank.poll()
    try:
        os.killpg(rank.pid, sign)
    except ProcessLookupError:
        return False
    return True


def _read(answers, ends):
    """A line, or what is wrong. The ranks answer whole lines, so waiting for the first byte is enough."""
    if not select.select([answers], [], [], max(0, ends - time.monotonic()))[0]:
        return {"error": "it did not answer in time"}
    line = answers.readline()
    return json.loads(line) if line else {"error": "it ended"}


def _together(heard):
    """The slowest rank counts; CPU time and torn tensors add up; the worst speed."""
    joined = {"cpu_s": sum, "torn": sum, "speed": min, "step_s": statistics.median}
    return {name: _join(joined.get(name, max), [answer[name] for answer in heard]) for name in heard[0]}


def _join(how, values):
    if isinstance(values[0], list):
        return [how(each) for each in zip(*values, strict=True)]
    return how(values)


def _start(python, spec, environment, log):
    return subprocess.Popen(
        [python, "-m", "benchmarks.common.rank", json.dumps(spec)], stdin=subprocess.PIPE, stdout=log, stderr=log,
        cwd=_ROOT, env=environment, pass_fds=[spec["answers"]], start_new_session=True, text=True,
    )  # fmt: skip


def _environment(rank, ranks, port):
    paths = [os.environ.get("PYTHONPATH", ""), str(_ROOT), str(_ROOT / "src")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONWARNINGS": "ignore",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
    }  # fmt: skip


def _free_port():
    """Below the range from which the kernel gives ports to others before we come to use it."""
    while True:
        port = random.randrange(15000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
