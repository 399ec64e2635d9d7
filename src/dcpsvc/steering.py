"""What is asked of a job beside its schedule: by signals, a file, commands, its own code. All ranks agree on a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcpsvc.commands import LiveCommands
from dcpsvc.control import Control
from dcpsvc.preemption import EXIT_STOPPED, Preemption
from dcpsvc.ranks.proposals import ABORT, SAVE, STOP, Proposals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dcpsvc.config import Options
    from dcpsvc.pending import PendingSave
    from dcpsvc.ranks.job import Job
    from dcpsvc.ranks.proposals import Agreed


class Steering:
    """One rank's side: watches, listens, and tells the training loop.

    Args:
        job: The ranks.
        options: Of the Checkpointer.
        due: Whether the schedule wants a save now; asked on the coordinator, a few times a second.

    Attributes:
        stopping: What all ranks agreed on when they stop, and why; empty while they go on.
        aborted: What is in flight is abandoned.
    """

    def __init__(self, job: Job, options: Options, due: Callable[[], bool]) -> None:
        self._preemption = Preemption(options.stop_signals, options.stop_file, options.grace_s, rank=job.rank)
        self._proposals = Proposals(job.rendezvous, due, self._preemption.wanted, lambda: self._preemption.requested)
        self._rank = job.rank
        self._commands: LiveCommands | None = None
        self._control: Control | None = None
        self.stopping, self.aborted = "", False

    def start(self, run_id: str, status: Callable[[], Mapping[str, Any]]) -> None:
        """Take signals, watch the ranks' store, listen to other shells. Main thread, for the signals."""
        self._preemption.install()
        self._proposals.start()
        self._commands = LiveCommands(self._proposals, status)
        self._control = Control(run_id, self._rank, self._commands)

    def stop(self) -> None:
        """Leave the signals and the socket; bounded."""
        self._proposals.stop()
        if self._commands is not None:
            self._commands.close()
        if self._control is not None:
            self._control.close()
        self._preemption.uninstall()

    def ask_to_stop(self, why: str) -> None:
        """Have all ranks save and stop soon. Any thread."""
        self._proposals.ask(STOP, why)

    def at(self, step: int) -> str | None:
        """What all ranks do at ``step``: a kind of :mod:`~dcpsvc.ranks.proposals`, or None. Training thread."""
        kind = self._proposals.at(step)
        if kind not in {None, SAVE}:
            told = self._proposals.agreed
            self.stopping, self.aborted = str(told or kind), kind == ABORT
            if told is not None and told.urgent:
                self._preemption.noticed(told.why)
        return kind

    def tell(self, step: int, agreed: str, begun: PendingSave | None) -> None:
        """Whoever asked in another shell hears of the step that was agreed on, and of its save."""
        if self._commands is not None:
            self._commands.tell(step, agreed, begun)

    @property
    def agreed(self) -> Agreed | None:
        """What the ranks have agreed on and not passed. Any thread."""
        return self._proposals.agreed

    @property
    def exit_code(self) -> int:
        """For ``sys.exit()``."""
        return EXIT_STOPPED if self.stopping else 0

    def left_s(self) -> float | None:
        """Of the grace after a preemption; None if there is none."""
        return self._preemption.left_s()

    def end_early(self) -> None:
        """The grace has run out while the job was closing."""
        self.stopping = self.stopping or self._preemption.requested
