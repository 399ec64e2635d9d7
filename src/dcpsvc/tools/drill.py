"""``dcpsvc drill sigterm``: send a preemption's signal to the user's own job and see what is left of it."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Literal

from dcpsvc.control import place
from dcpsvc.errors import DcpsvcError
from dcpsvc.stages import discover
from dcpsvc.storage.open import open_store
from dcpsvc.tools import live, processes
from dcpsvc.tools.judging import Course, Verdict, at_least, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dcpsvc.tools.live import LiveRank
    from dcpsvc.tools.processes import Family

SIGNALS = {"TERM": signal.SIGTERM, "USR1": signal.SIGUSR1}
"""What clusters announce a preemption with."""

POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Drill:
    """What to do to which command.

    Attributes:
        command: Starts the job, and ends with it: ``torchrun ... train.py``.
        root: Its run root; None takes the first run that a process of the command opens.
        storage_options: For the run root.
        after_steps: The signal is sent when this many steps were seen.
        signum: Which signal.
        to: ``rank``, one process of the job, as if one host were preempted; ``launcher``, the command itself.
        grace_s: What the job gets between the signal and SIGKILL; torchrun, Slurm and Kubernetes give 30 s.
        start_s: Longest wait for the steps.
    """

    command: tuple[str, ...]
    root: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    after_steps: int = 3
    signum: signal.Signals = signal.SIGTERM
    to: Literal["rank", "launcher"] = "rank"
    grace_s: float = 30.0
    start_s: float = 600.0


def run(drill: Drill, output: IO[bytes] | None = None, say: Callable[[str], None] = lambda _: None) -> Verdict:
    """Run the command, send the signal, watch, and judge. Whatever ends this call ends every process of the command.

    Args:
        drill: What to do.
        output: Where the command's standard output goes; None: to ours.
        say: Told what happens, a line each.

    Raises:
        OSError: The command cannot be started.
    """
    watch = _Watch(drill)
    with processes.family(drill.command, output) as job:
        if target := watch.await_steps(job):
            watch.send(target, say)
            watch.follow(job)
            say("every process has ended" if watch.seen.ended_s is not None else "the grace is over: SIGKILL")
        watch.seen.exit_code = None if job.alive else job.launcher.poll()
    watch.take_stock()
    return judge(watch.seen)


class _Watch:
    """Sees the job through its sockets, and afterwards through its files."""

    def __init__(self, drill: Drill) -> None:
        self._drill = drill
        self._strangers = set(place.found())
        self._run_id: str | None = None
        self._local_paths: set[str] = set()
        self._sent = 0.0
        self.seen = Course(
            asked_root=drill.root,
            wanted_steps=drill.after_steps,
            waited_s=drill.start_s,
            grace_s=drill.grace_s,
            signal=drill.signum.name,
        )

    def await_steps(self, job: Family) -> tuple[str, int] | None:
        """Whom to send the signal: a name and a process id; None if the job does not come that far."""
        deadline = time.monotonic() + self._drill.start_s
        first: int | None = None
        while job.look() and time.monotonic() < deadline:
            ranks = self._look(job)
            if ranks and self.seen.steps is None:
                self.seen.steps = 0
            if (step := self.seen.last_step) is not None:
                first = step if first is None else first
                self.seen.steps = step - first
                if self.seen.steps >= self._drill.after_steps:
                    return self._target(job, ranks)
            time.sleep(POLL_S)
        return None

    def send(self, target: tuple[str, int], say: Callable[[str], None]) -> None:
        """Send the signal."""
        name, pid = target
        self.seen.target, self.seen.step_at_signal = f"{name} (process {pid})", self.seen.last_step
        say(f"{self._drill.signum.name} to {self.seen.target} after step {self.seen.last_step}")
        self._sent = time.monotonic()
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, self._drill.signum)

    def follow(self, job: Family) -> None:
        """Until every process has ended, or the grace is over."""
        while job.look() and self._since_s() < self._drill.grace_s:
            if not self._look(job):  # its Checkpointers are closed: only the run root can tell
                self._note_progress({"newest": self._newest()})
            time.sleep(POLL_S)
        if not job.alive:
            self.seen.ended_s = self._since_s()

    def take_stock(self) -> None:
        """What a restart would find."""
        seen = self.seen
        seen.newest = self._newest()
        local = [_newest(path, {}) for path in self._local_paths]
        seen.newest_local = max((step for step in local if step is not None), default=None)
        if seen.ended_s is not None:
            self._note_milestones(seen.newest, _MILESTONES, seen.ended_s)

    def _target(self, job: Family, ranks: list[LiveRank]) -> tuple[str, int]:
        """The last rank, because it does not coordinate: what it is told must reach the others."""
        if self._drill.to == "launcher":
            return "the launcher", job.launcher.pid
        last = max(ranks, key=lambda rank: (rank.rank or 0, rank.pid))
        return f"rank {last.rank}", last.pid

    def _look(self, job: Family) -> list[LiveRank]:
        """The ranks of the job that answer; what they say is noted."""
        if self._run_id is None and self._drill.root is not None:
            with suppress(DcpsvcError):  # the job has yet to make it
                self._run_id = live.run_id(self._drill.root, self._drill.storage_options)
            if self._run_id is None:
                return []
        found = [rank for rank in live.ranks(self._run_id) if rank.status and self._belongs(rank, job)]
        if found and self._run_id is None:
            self._run_id = found[0].place.run_id
        ranks = [rank for rank in found if rank.place.run_id == self._run_id]
        for rank in ranks:
            self._note(rank.status)
        return ranks

    def _belongs(self, rank: LiveRank, job: Family) -> bool:
        """No job but the command's own is ever signalled; started by a daemon, it is known by its root."""
        return rank.pid in job.alive or (self._drill.root is not None and rank.place not in self._strangers)

    def _note(self, status: Mapping[str, Any]) -> None:
        seen = self.seen
        seen.root = str(status.get("root") or seen.root)
        if path := status.get("local_path"):
            self._local_paths.add(str(path))
        seen.last_step = max((step for step in (status.get("step"), seen.last_step) if step is not None), default=None)
        seen.phase = next((str(save.get("phase")) for save in (status.get("in_flight") or ())), "")
        if seen.target:
            self._note_progress(status)

    def _note_progress(self, status: Mapping[str, Any]) -> None:
        seen, since_s = self.seen, self._since_s()
        if (stop_step := status.get("stop_step")) is not None:
            seen.stop_step = stop_step
            seen.agreed_s = since_s if seen.agreed_s is None else seen.agreed_s
        saving = max((save.get("step") for save in (status.get("in_flight") or ())), default=None)
        newest, newest_local = status.get("newest"), status.get("newest_local")
        for count, reached in enumerate((saving, newest_local, newest), 1):
            self._note_milestones(reached, _MILESTONES[:count], since_s)

    def _note_milestones(self, reached: int | None, names: tuple[str, ...], since_s: float) -> None:
        for name in names:
            if at_least(reached, self.seen.step_at_signal) and getattr(self.seen, name) is None:
                setattr(self.seen, name, since_s)

    def _newest(self) -> int | None:
        return _newest(self._drill.root or self.seen.root, self._drill.storage_options)

    def _since_s(self) -> float:
        return round(time.monotonic() - self._sent, 2)


_MILESTONES = ("staged_s", "local_s", "committed_s")


def _newest(root: str, storage_options: Mapping[str, Any]) -> int | None:
    """Newest step with a manifest; None too where nobody can say: then nothing is proven."""
    try:
        attempts = discover.committed(open_store(root, storage_options)) if root else []
    except DcpsvcError:
        return None
    return max((attempt.step for attempt in attempts), default=None)
