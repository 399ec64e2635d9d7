"""One client of a live job, from its line to its answer."""

from __future__ import annotations

import math
import selectors
import socket
import time
from typing import TYPE_CHECKING, Any

from dcpsvc.control import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dcpsvc.control.request import Request

TALK_S = 5.0
"""How long a client may take to say its line, and again to take what it is told."""
WAIT_S = 24 * 3600.0
"""How long a client may wait for what it asked for."""


class Conversation:
    """Never blocks, never raises, and ends by itself. Control thread only.

    Args:
        connection: To the client; closed when it is over.
        about: Who answers: told to the client with the first line.
        obey: Called with the client's message. What it raises is told to the client.

    Attributes:
        connection: As given.
        over: Nothing more will be said.
    """

    def __init__(
        self, connection: socket.socket, about: Mapping[str, Any], obey: Callable[[Mapping[str, Any]], Request]
    ) -> None:
        connection.settimeout(0.0)
        self.connection, self._about, self._obey = connection, about, obey
        self.over = False
        self._received, self._unsent = bytearray(), bytearray()
        self._request: Request | None = None
        self._told_step: int | None = None
        self._ending = False
        self._ends = time.monotonic() + TALK_S
        self._taken_by = math.inf

    @property
    def interest(self) -> int:
        """What to wait for, in the words of :mod:`selectors`."""
        if self._ending:
            return selectors.EVENT_WRITE
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)

    @property
    def left_s(self) -> float:
        """Until somebody's patience is at its end."""
        return max(0.0, min(self._ends, self._taken_by) - time.monotonic())

    def turn(self, *, readable: bool) -> None:
        """Read, do and write what can be without waiting."""
        try:
            if readable and not self._ending:
                self._read()
            self._tell_news()
            if self.left_s == 0:
                self._run_out()
            self._write()
        except OSError:  # the client is gone
            self.close()

    def refuse(self, error: str, text: str) -> None:
        """Say why not, and end."""
        self._finish({"event": "failed", "error": error, "text": text})

    def farewell(self) -> None:
        """The job ends: whoever has not been answered is told so."""
        self._tell_news()
        if not self._ending:
            self.refuse("ClosedError", "the job ended, or closed its Checkpointer, before this was done")

    def close(self) -> None:
        """End without a word."""
        self.over = True
        self.connection.close()

    def _read(self) -> None:
        try:
            received = self.connection.recv(wire.MAX_REQUEST_NBYTES)
        except BlockingIOError:
            return
        if not received:
            self.close()
        elif self._request is None:
            self._received += received
            line, newline, _ = self._received.partition(b"\n")
            if newline:
                self._hear(bytes(line))
            elif len(self._received) >= wire.MAX_REQUEST_NBYTES:
                self.refuse("ProtocolError", f"a line of {wire.MAX_REQUEST_NBYTES} bytes or more")

    def _hear(self, line: bytes) -> None:
        self._say({"event": "hello"} | dict(self._about))
        try:
            self._request = self._obey(wire.decode(line))
        except (Exception, SystemExit) as err:  # noqa: BLE001 - whatever it is, it must not reach the training
            self.refuse(type(err).__name__, str(err))
        else:
            self._ends = time.monotonic() + WAIT_S

    def _tell_news(self) -> None:
        request = self._request
        if request is None or self.over:
            return
        step, done = request.agreed_step, request.answer.done()
        if step is not None and step != self._told_step:
            self._told_step = step
            self._say({"event": "agreed", "step": step})
        if done and (error := request.answer.exception()) is not None:
            self.refuse(type(error).__name__, str(error))
        elif done:
            self._finish({"event": "done", "answer": request.answer.result()})

    def _finish(self, message: dict[str, Any]) -> None:
        self._request, self._ending = None, True
        self._ends = time.monotonic() + TALK_S
        try:
            self._say(message)
        except (TypeError, ValueError, RecursionError) as err:  # an answer that is not JSON-like
            self._say({"event": "failed", "error": type(err).__name__, "text": f"the answer cannot be sent: {err}"})

    def _say(self, message: dict[str, Any]) -> None:
        if not self._unsent:
            self._taken_by = time.monotonic() + TALK_S
        self._unsent += wire.encode(message)

    def _write(self) -> None:
        try:
            while self._unsent and not self.over:
                sent = self.connection.send(self._unsent, socket.MSG_NOSIGNAL)  # a script may have SIGPIPE kill it
                del self._unsent[:sent]
        except BlockingIOError:
            return
        self._taken_by = math.inf
        if self._ending and not self.over:
            self.close()

    def _run_out(self) -> None:
        if self._ending or self._unsent:  # it does not listen
            self.close()
        elif self._request is None:
            self.refuse("TimeoutError", f"no line within {TALK_S} s")
        else:
            self.refuse("TimeoutError", f"not done within {WAIT_S} s; it still stands")
