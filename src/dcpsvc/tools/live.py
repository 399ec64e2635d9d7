"""Asking a live job: finding its ranks on this host, and having one of them act. Needs no torch."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dcpsvc.control import place, wire
from dcpsvc.control.wire import ProtocolError
from dcpsvc.format import keys, run
from dcpsvc.reading import open_root
from dcpsvc.storage.names import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from dcpsvc.control.place import Place

ANSWER_S = 3.0
"""How long a rank may take to say how it is doing."""
_AT_ONCE = 16


class LiveError(Exception):
    """A live job did not do what was asked."""


class NoLiveJobError(LiveError):
    """No process of the run answers on this host."""

    def __init__(self, where: str, silent: tuple[int, ...] = ()) -> None:
        super().__init__(where, silent)
        self.where, self.silent = where, silent

    def __str__(self) -> str:
        if self.silent:
            pids = ", ".join(map(str, self.silent))
            return f"{self.where}: its processes on {socket.gethostname()} do not answer: {pids}"
        return f"{self.where}: no live job of this run on {socket.gethostname()}"


class NotDoneError(LiveError):
    """The job was asked, and it did not do it.

    Attributes:
        cause: Type of what went wrong in the job; empty where the job did not say.
    """

    def __init__(self, text: str, cause: str = "") -> None:
        super().__init__(text, cause)
        self.text, self.cause = text, cause

    def __str__(self) -> str:
        return f"{self.cause}: {self.text}" if self.cause else self.text


class NoAnswerError(NotDoneError):
    """The job was asked and did not answer in time: it acts all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRank:
    """One process of a live job.

    Attributes:
        place: Its socket.
        rank: Global rank; None if it does not answer.
        status: What it says; see :meth:`dcpsvc.control.Commands.status`.
        problem: Why there is no status.
    """

    place: Place
    rank: int | None = None
    status: Mapping[str, Any] = field(default_factory=dict[str, Any])
    problem: str = ""

    @property
    def pid(self) -> int:
        """Process id, as the process numbers itself."""
        return self.place.pid

    def document(self) -> dict[str, Any]:
        """Everything as JSON-like values."""
        about = {"rank": self.rank, "pid": self.pid, "run_id": self.place.run_id, "problem": self.problem or None}
        return about | dict(self.status)


def run_id(root: str, storage_options: Mapping[str, Any] | None = None) -> str:
    """Identity of the run at a root.

    Raises:
        RootError: There is no run at that place.
    """
    store = open_root(root, storage_options)
    return run.loads(store.url, store.get(keys.RUN, max_nbytes=run.MAX_NBYTES)).run_id


def ranks(of: str | None = None) -> list[LiveRank]:
    """The live processes of a run on this host, or of all runs of this user: by rank, silent ones last."""
    places = place.found(of)
    with ThreadPoolExecutor(min(_AT_ONCE, len(places)) or 1) as threads:
        found = [rank for rank in threads.map(_look, places) if rank is not None]
    return sorted(found, key=lambda rank: (rank.rank is None, rank.rank or 0, rank.pid))


def speaker(root: str, storage_options: Mapping[str, Any] | None = None) -> LiveRank:
    """The lowest rank of the run at ``root`` that answers on this host.

    Raises:
        RootError: There is no run at that place.
        NoLiveJobError: None answers.
        NotDoneError: Two do: there are two live jobs.
    """
    live = ranks(run_id(root, storage_options))
    if not live or live[0].rank is None:
        raise NoLiveJobError(redact(root), tuple(rank.pid for rank in live))
    lowest = [rank for rank in live if rank.rank == live[0].rank]
    if len(lowest) > 1:
        pids = " and ".join(str(rank.pid) for rank in lowest)
        raise NotDoneError(
            f"{redact(root)}: processes {pids} both say they are rank {live[0].rank}: end the job that is not wanted"
        )
    return lowest[0]


def command(
    to: LiveRank, asked: dict[str, Any], timeout_s: float, on_agreed: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Have the job act; returns its answer once it has.

    Args:
        to: Any rank; it tells the others.
        asked: ``{"command": "save"}``, ``{"command": "stop", "save": True}`` or ``{"command": "abort"}``.
        timeout_s: Longest wait for the answer.
        on_agreed: Called with the step at which all ranks will act, once they have agreed.

    Raises:
        NoLiveJobError: The process has ended.
        NotDoneError: The job could not; NoAnswerError, if it did not say in time.
    """
    deadline = time.monotonic() + timeout_s
    try:
        for message in _talk(to.place, asked, deadline):
            if message.get("event") == "agreed":
                on_agreed(int(message["step"]))
            elif message.get("event") == "failed":
                raise NotDoneError(str(message.get("text")), str(message.get("error")))
            elif message.get("event") == "done":
                return dict(message["answer"])
    except TimeoutError:
        raise NoAnswerError(f"{_named(to)} did not answer within {timeout_s:g} s; what was asked stands") from None
    except (OSError, ProtocolError) as err:
        raise NotDoneError(f"{_named(to)}: {err}") from err
    raise NotDoneError(f"{_named(to)} ended before it answered; the run root tells what is committed")


def _look(at: Place) -> LiveRank | None:
    """How one process is doing; None if it is dead."""
    deadline = time.monotonic() + ANSWER_S
    rank: int | None = None
    problem = "it closed the connection"
    try:
        for message in _talk(at, {"command": "status"}, deadline):
            if message.get("event") == "hello":
                rank = int(message["rank"])
            elif message.get("event") == "done":
                return LiveRank(place=at, rank=rank, status=dict(message["answer"]))
            elif message.get("event") == "failed":
                problem = f"{message.get('error')}: {message.get('text')}"
    except NoLiveJobError:
        return None
    except TimeoutError:
        problem = f"no answer within {ANSWER_S:.0f} s"
    except (OSError, ProtocolError, KeyError, ValueError, TypeError) as err:
        problem = str(err)
    return LiveRank(place=at, rank=rank, problem=problem)


def _talk(to: Place, asked: dict[str, Any], deadline: float) -> Iterator[dict[str, Any]]:
    """Say one thing; give every message that comes back until the other side closes.

    Raises:
        NoLiveJobError: The process is dead.
        TimeoutError: The deadline passed.
        OSError: The connection broke.
        ProtocolError: What came back is not of this protocol.
    """
    connection = place.connect(to, _left_s(deadline))
    if connection is None:
        raise NoLiveJobError(f"process {to.pid}")
    with connection:
        with suppress(BrokenPipeError):  # it will not hear us; it may have said why
            connection.sendall(wire.encode(asked))
        received = bytearray()
        while more := _receive(connection, deadline):
            received += more
            *lines, rest = received.split(b"\n")
            received = bytearray(rest)
            for line in lines:
                yield wire.decode(bytes(line))
            if len(received) > wire.MAX_REPLY_NBYTES:
                raise ProtocolError(f"a line of more than {wire.MAX_REPLY_NBYTES} bytes")


def _receive(connection: socket.socket, deadline: float) -> bytes:
    connection.settimeout(_left_s(deadline))
    try:
        return connection.recv(1 << 16)
    except ConnectionResetError:  # it closed before it had read all we said
        return b""


def _left_s(deadline: float) -> float:
    if (left_s := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left_s


def _named(rank: LiveRank) -> str:
    return f"rank {rank.rank} (process {rank.pid})"
