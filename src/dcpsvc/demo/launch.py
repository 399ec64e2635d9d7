"""Starts a training job the way a user would, follows it, and leaves no process behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dcpsvc.demo.journal import Kill, Story, Tail

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from pathlib import Path
    from types import FrameType

POLL_S = 0.1
WORKER_GRACE_S = 10
"""What torchrun grants the surviving ranks between SIGTERM and SIGKILL; its own default is 30."""
STOP_S = WORKER_GRACE_S + 5
LAST_LINES = 25

_LAUNCHER_LINE = re.compile(r"^[EW]\d{4} .*torch/distributed/elastic/", re.MULTILINE)


class JobTimeoutError(Exception):
    """A run of the demo did not end in time and was stopped."""

    def __init__(self, name: str, waited_s: float, output: str) -> None:
        super().__init__(name, waited_s, output)
        self.name, self.waited_s, self.output = name, waited_s, output

    def __str__(self) -> str:
        return f"the {self.name} run did not end within {self.waited_s:.0f} s and was stopped\n{self.output}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of ``dcpsvc.demo.train``."""

    name: str
    root: str
    directory: Path
    """Where the journal, the output and the local tier go."""
    parallel: str
    ranks: int
    steps: int
    every: int
    kill: Kill | None = None
    dropout: float | None = None
    """Other than the example's own: what makes a resumed run differ."""
    storage_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Travels in the environment: it may hold credentials."""

    @property
    def journal(self) -> Path:
        """What the run says about itself."""
        return self.directory / f"{self.name}.jsonl"

    @property
    def output(self) -> Path:
        """Everything the run printed."""
        return self.directory / f"{self.name}.log"

    def command(self) -> list[str]:
        """The command line; with one process and nothing to shard, torchrun is not needed."""
        torchrun = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        launcher = [] if self.parallel == "none" else [*torchrun, "--nproc-per-node", str(self.ranks), "-m"]
        return [sys.executable, "-m", *launcher, "dcpsvc.demo.train", *self._arguments()]

    def _arguments(self) -> list[str]:
        options = {
            "root": self.root,
            "nvme": self.directory / "nvme",
            "parallel": self.parallel,
            "steps": self.steps,
            "every": self.every,
            "journal": self.journal,
            "kill": self.kill,
            "dropout": self.dropout,
        }
        return [text for key, value in options.items() if value is not None for text in (f"--{key}", str(value))]

    def environment(self) -> dict[str, str]:
        """This process's environment, on the loopback interface, one thread a rank."""
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        return os.environ | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": loopback,
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(WORKER_GRACE_S),
            "DCPSVC_DEMO_STORAGE_OPTIONS": json.dumps(dict(self.storage_options)),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """How a run ended."""

    story: Story
    exit_code: int
    seconds: float
    output: str
    """The end of what it printed."""


def run_job(job: Job, *, timeout_s: float, watch: Callable[[Story], None]) -> Finished:
    """Run a job to its end, successful or not.

    Whatever ends this call early (the deadline, Ctrl-C, SIGTERM) also ends every process of the job.

    Raises:
        JobTimeoutError: It was still running after ``timeout_s``.
    """
    started = time.monotonic()
    story, tail = Story(), Tail(job.journal)
    with _sigterm_raises(), _process(job, story) as process:
        while True:
            ended = process.poll() is not None  # before the read: nothing is written after it
            for line in tail.read():
                story.take(line)
            watch(story)
            seconds = time.monotonic() - started
            if ended:
                return Finished(story=story, exit_code=process.returncode, seconds=seconds, output=_last_lines(job))
            if seconds > timeout_s:
                raise JobTimeoutError(job.name, seconds, _last_lines(job))
            time.sleep(POLL_S)


@contextmanager
def _process(job: Job, story: Story) -> Generator[subprocess.Popen[bytes]]:
    with job.output.open("wb") as output:
        # A session of its own, so that Ctrl-C reaches this process alone and it decides what ends.
        process = subprocess.Popen(  # noqa: S603 - our own command line
            job.command(),
            env=job.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                _stop(process, story)


def _stop(process: subprocess.Popen[bytes], story: Story) -> None:
    """End torchrun, which ends its ranks; should it not, end each rank that told its process id."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    finally:
        if process.poll() is None:
            process.kill()
            for pid in story.pids.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _sigterm_raises() -> Generator[None]:
    """Let SIGTERM unwind this process, as Ctrl-C does, instead of leaving the job running without it."""

    def unwind(signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    try:
        before = signal.signal(signal.SIGTERM, unwind)
    except ValueError:  # not the main thread: no signal arrives here
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _last_lines(job: Job) -> str:
    """What the ranks printed last, without the launcher's own obituary below it."""
    text = job.output.read_text(errors="replace")
    ranks = _LAUNCHER_LINE.split(text, maxsplit=1)[0].strip()
    return "\n".join([*(ranks or text).splitlines()[-LAST_LINES:], f"(all of it: {job.output})"])
