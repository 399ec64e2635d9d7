"""The server side: one thread in every training process, which no client can disturb."""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dcpsvc.control import place
from dcpsvc.control.conversation import Conversation
from dcpsvc.control.request import Request
from dcpsvc.control.wire import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcpsvc.control.request import Commands

logger = logging.getLogger("dcpsvc")

MAX_CLIENTS = 32
FAREWELL_S = 1.0
"""How long clients may take to hear the answer when the job ends."""

_REST_S = 0.2


class Control:
    """Listens until :meth:`close`. Where no socket can be made it says so once, and does nothing.

    A forked child does not serve, and leaves the socket to its parent.

    Args:
        run_id: Of the run root; clients find the job by it.
        rank: Of this process.
        commands: What clients may ask for.

    Attributes:
        place: Where it listens; None if it does not.
    """

    def __init__(self, run_id: str, rank: int, commands: Commands) -> None:
        self._rank, self._commands = rank, commands
        self._clients: set[Conversation] = set()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self.place: place.Place | None = None
        try:
            self._listener, self.place = place.listen(run_id)
        except OSError as err:
            logger.warning("rank %s cannot be controlled from another shell: %s", rank, err)
            return
        self._bell, self._ringer = socket.socketpair()
        for end in (self._bell, self._ringer):
            end.settimeout(0.0)
        self._thread = threading.Thread(target=self._run, args=(self.place,), name="dcpsvc-control", daemon=True)
        _listening.add(self)
        self._thread.start()

    def close(self) -> None:
        """Tell whoever still waits that the job has ended, and remove the socket; bounded. Again does nothing."""
        if self._thread is None or self.place is None:
            return
        thread, listened = self._thread, self.place
        self._thread = self.place = None
        self._closing.set()
        self._ring()
        thread.join(2 * FAREWELL_S)
        place.remove(listened.path)  # should the thread be stuck in a command

    def forget(self) -> None:
        """In a forked child: the sockets are the parent's alone."""
        self._thread = self.place = None
        self._close_sockets()

    def _run(self, listened: place.Place) -> None:
        try:
            while not self._closing.is_set():
                self._turn()
            place.remove(listened.path)
            self._say_farewell()
        except Exception:  # whatever it is, it must not reach the training
            logger.exception("rank %s cannot be controlled from another shell any more", self._rank)
        finally:
            place.remove(listened.path)
            self._close_sockets()

    def _say_farewell(self) -> None:
        deadline = time.monotonic() + FAREWELL_S
        for client in self._clients:
            client.farewell()
        while self._clients and (left_s := deadline - time.monotonic()) > 0:
            self._turn(left_s)

    def _turn(self, timeout_s: float | None = None) -> None:
        """Wait until something happens or a client's time is up, and see to it."""
        with selectors.PollSelector() as selector:  # holds no descriptor that a forked child would share
            selector.register(self._bell, selectors.EVENT_READ)
            if not self._closing.is_set():
                selector.register(self._listener, selectors.EVENT_READ)
            for client in self._clients:
                selector.register(client.connection, client.interest, client)
            patience = [client.left_s for client in self._clients] + ([] if timeout_s is None else [timeout_s])
            ready = {key.fileobj: events for key, events in selector.select(min(patience, default=None))}
        if self._bell in ready:
            self._bell.recv(4096)
        for client in self._clients:
            client.turn(readable=bool(ready.get(client.connection, 0) & selectors.EVENT_READ))
        self._clients = {client for client in self._clients if not client.over}
        if self._listener in ready:
            self._accept()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as err:  # out of descriptors: the client is still there at the next turn
            logger.debug("a control client has to wait: %s", err)
            self._closing.wait(_REST_S)
            return
        client = Conversation(connection, {"rank": self._rank, "pid": os.getpid()}, self._obey)
        if not place.permitted(connection):
            client.refuse("PermissionError", "this job belongs to another user")
        elif len(self._clients) >= MAX_CLIENTS:
            client.refuse("BusyError", f"{MAX_CLIENTS} clients are being served; try again")
        client.turn(readable=False)
        if not client.over:
            self._clients.add(client)

    def _obey(self, message: Mapping[str, Any]) -> Request:
        match message:
            case {"command": "status"}:
                request = Request()
                request.resolve(self._commands.status())
                return request
            case {"command": "save"}:
                request = self._commands.save()
            case {"command": "stop", "save": bool(save)}:
                request = self._commands.stop(save=save)
            case {"command": "abort"}:
                request = self._commands.abort()
            case _:
                raise ProtocolError("no such command; there are status, save, stop (save: true or false) and abort")
        logger.info("event=asked rank=%s command=%s", self._rank, message["command"])
        request.listen(self._ring)
        return request

    def _ring(self) -> None:
        with suppress(OSError):  # it rings already, or nobody is there any more
            self._ringer.send(b"!", socket.MSG_NOSIGNAL)

    def _close_sockets(self) -> None:
        for end in (self._listener, self._bell, self._ringer, *(client.connection for client in self._clients)):
            end.close()


_listening: weakref.WeakSet[Control] = weakref.WeakSet()


def _forget_in_child() -> None:
    for control in tuple(_listening):
        control.forget()


os.register_at_fork(after_in_child=_forget_in_child)
