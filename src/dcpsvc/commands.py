"""What a live job does when somebody asks from another shell: the training side of :mod:`dcpsvc.control`."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

from dcpsvc.control import Request
from dcpsvc.errors import ClosedError
from dcpsvc.ranks.proposals import ABORT, QUIT, SAVE, STOP

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from dcpsvc.pending import PendingSave
    from dcpsvc.ranks.proposals import Proposals

_SATISFIED_BY = {SAVE: {SAVE, STOP}, STOP: {STOP}, QUIT: {STOP, QUIT, ABORT}, ABORT: {ABORT}}


class LiveCommands:
    """Asks the ranks to agree on a step; answers when that step's save has ended."""

    def __init__(self, proposals: Proposals, status: Callable[[], Mapping[str, Any]]) -> None:
        self._proposals, self._status = proposals, status
        self._lock = threading.Lock()
        self._waiting: list[tuple[str, Request]] = []

    def status(self) -> Mapping[str, Any]:
        """How this rank is doing. Any thread."""
        return self._status()

    def save(self) -> Request:
        """All ranks save a few steps from now."""
        return self._ask(SAVE)

    def stop(self, *, save: bool) -> Request:
        """All ranks stop a few steps from now."""
        return self._ask(STOP if save else QUIT)

    def abort(self) -> Request:
        """All ranks stop without a save; what is in flight is abandoned."""
        return self._ask(ABORT)

    def tell(self, step: int, agreed: str, pending: PendingSave | None) -> None:
        """The ranks have come to a step they agreed on. Training thread.

        Args:
            step: The step.
            agreed: What they do there.
            pending: The save of that step, whoever began it; None if there is none.
        """
        with self._lock:
            asked = [request for kind, request in self._waiting if agreed in _SATISFIED_BY[kind]]
            self._waiting = [(kind, request) for kind, request in self._waiting if agreed not in _SATISFIED_BY[kind]]
        for request in asked:
            request.agree(step)
            if pending is None or agreed in {QUIT, ABORT}:
                request.resolve({"step": step, "attempt": "", "state": "stopped"})
            else:
                pending.committed.add_done_callback(functools.partial(_answer, request, pending))

    def close(self) -> None:
        """Nobody will come to another step."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for _, request in waiting:
            request.fail(ClosedError("the job ended before it came to the step that was agreed on"))

    def _ask(self, kind: str) -> Request:
        request = Request()
        with self._lock:
            self._waiting.append((kind, request))
        self._proposals.ask(kind, "asked for by a command")
        return request


def _answer(request: Request, pending: PendingSave, done: Future[None]) -> None:
    if error := done.exception():
        request.fail(error)
    else:
        request.resolve({"step": pending.step, "attempt": pending.attempt, "state": pending.state})
