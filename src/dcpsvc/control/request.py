"""What a live job can be asked, and the promise of an answer."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future, InvalidStateError, wait
from typing import TYPE_CHECKING, Any, Protocol

from dcpsvc.errors import WaitTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Commands(Protocol):
    """What the training side does when somebody asks. Called on the control thread; must not wait for anything."""

    def status(self) -> Mapping[str, Any]:
        """How this rank is doing, in JSON-like values.

        Clients show these, and do without any that is missing:

        - ``root``, ``local_path``, ``world_size``: where the run lives.
        - ``step``: the last one told to ``step()`` or ``save()``; None before the first.
        - ``newest``: newest committed step; None if there is none.
        - ``newest_local``: newest step whose shards are durable on every rank's local tier.
        - ``in_flight``: a list, oldest first, of ``{"step": int, "attempt": str, "phase": str}``.
        - ``committed``, ``failed``, ``skipped``: saves so far.
        - ``blocked_s``: training time lost in ``save()``.
        - ``slowest``: the rank that the newest commit waited for, for people; empty if none stood out.
        - ``next_save``: for people.
        - ``stop_step``: the step after which all ranks agreed to stop; None while there is none.
        """
        ...

    def save(self) -> Request:
        """Have all ranks save a few steps from now."""
        ...

    def stop(self, *, save: bool) -> Request:
        """Have all ranks stop a few steps from now, with a save or without."""
        ...

    def abort(self) -> Request:
        """Have all ranks stop without a save, and abandon what is in flight."""
        ...


class Request:
    """Something that was asked of a job. Any thread.

    Attributes:
        answer: Resolves once, when what was asked is done, or holds the error.
    """

    def __init__(self) -> None:
        self.answer: Future[dict[str, Any]] = Future()
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []
        self._agreed_step: int | None = None

    @property
    def agreed_step(self) -> int | None:
        """The step at which all ranks will act; None until they have agreed."""
        return self._agreed_step

    def agree(self, step: int) -> None:
        """Tell whoever asked at which step it will be done. A later step replaces it."""
        self._agreed_step = step
        self._tell()

    def resolve(self, answer: Mapping[str, Any]) -> None:
        """It is done: ``{"step": 40, "attempt": "cafe-0", "state": "committed"}``. The first word stands."""
        with contextlib.suppress(InvalidStateError):
            self.answer.set_result(dict(answer))
        self._tell()

    def fail(self, error: BaseException) -> None:
        """It will not be done. The first word stands."""
        with contextlib.suppress(InvalidStateError):
            self.answer.set_exception(error)
        self._tell()

    def wait(self, timeout_s: float) -> dict[str, Any]:
        """The answer.

        Raises:
            WaitTimeoutError: Not yet; what was asked still stands.
            BaseException: What :meth:`fail` was given.
        """
        if not wait([self.answer], timeout_s).done:
            raise WaitTimeoutError(timeout_s, ("the answer to a command",))
        return self.answer.result()

    def listen(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called, on any thread, whenever there is news; at once if there already was."""
        with self._lock:
            self._listeners.append(listener)
        if self.answer.done() or self._agreed_step is not None:
            listener()

    def _tell(self) -> None:
        with self._lock:
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()
