"""A proxy between a client and a real S3 server that spoils chosen requests, as networks and busy servers do."""

from __future__ import annotations

import re
import socket
import struct
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    Fault = Callable[["Spoiler"], None]

STEP_NBYTES = 2**16
HOP = frozenset({"connection", "transfer-encoding", "expect", "keep-alive"})


class Proxy(ThreadingHTTPServer):
    """Passes every request on, unless :meth:`spoil` says otherwise.

    Attributes:
        seen: Every request, as ``PUT /bucket/key?query``; one that copies ends in `` copy``.
        spoiled: Those that met a fault.
        body_nbytes: Of all bodies that came and went.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), Spoiler)
        self.upstream = endpoint.removeprefix("http://")
        self.seen: list[str] = []
        self.spoiled: list[str] = []
        self.body_nbytes = {"sent": 0, "received": 0}
        self._plan: list[tuple[re.Pattern[str], Fault]] = []
        self._lock = threading.Lock()
        self.over = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are what this is for."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def spoil(self, pattern: str, fault: Fault, times: int = 1) -> None:
        """Let the next requests whose line matches meet a fault."""
        self._plan.extend([(re.compile(pattern), fault)] * times)

    def fault_for(self, line: str) -> Fault | None:
        with self._lock:
            self.seen.append(line)
            for entry in self._plan:
                if entry[0].search(line):
                    self._plan.remove(entry)
                    self.spoiled.append(line)
                    return entry[1]
        return None

    def calm(self) -> None:
        """Spoil nothing more."""
        with self._lock:
            self._plan.clear()

    @property
    def left(self) -> int:
        """Faults that nobody has met yet."""
        return len(self._plan)


class Spoiler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: object) -> None:  # type: ignore[override]
        """Say nothing."""

    def handle_request(self) -> None:
        copy = " copy" if self.headers.get("x-amz-copy-source") else ""
        fault = self.server.fault_for(f"{self.command} {self.path}{copy}")
        (fault or passes)(self)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815  as http.server has it

    @property
    def length(self) -> int:
        return int(self.headers.get("Content-Length") or 0)

    def body(self) -> bytes:
        if self.headers.get("Expect"):
            self.send_response_only(100)
            self.end_headers()
        data = self.rfile.read(self.length)
        self.server.body_nbytes["sent"] += len(data)
        return data

    def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """What the real server says."""
        connection = HTTPConnection(self.server.upstream, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, [(k, v) for k, v in answer.getheaders() if k.lower() not in HOP], answer.read()
        finally:
            connection.close()

    def tell(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.server.body_nbytes["received"] += len(body)
        self.wfile.write(body)

    def begin_answer(self, status: int, headers: list[tuple[str, str]]) -> None:
        """What comes before the body, which the caller sends as it likes."""
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def reset(self) -> None:
        """End the connection with RST, as a middlebox does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        self.rfile = self.wfile = open("/dev/null", "r+b", buffering=0)  # noqa: PTH123, SIM115 - http.server flushes it


def passes(spoiler: Spoiler) -> None:
    spoiler.tell(*spoiler.ask(spoiler.body()))


def says(status: int, code: str) -> Fault:
    """The server is asked nothing."""

    def fault(spoiler: Spoiler) -> None:
        spoiler.body()
        spoiler.tell(status, [], f"<Error><Code>{code}</Code></Error>".encode())

    return fault


def says_nothing(spoiler: Spoiler) -> None:
    """As if all were well, with an empty answer: a server that does not know what it was asked for."""
    spoiler.body()
    spoiler.tell(200, [], b"")


def resets_in_the_request(spoiler: Spoiler) -> None:
    """The connection breaks when half of the body has gone up."""
    spoiler.rfile.read(spoiler.length // 2)
    spoiler.reset()


def resets_in_the_answer(spoiler: Spoiler) -> None:
    """The connection breaks when half of the answer has come down."""
    status, headers, body = spoiler.ask(spoiler.body())
    spoiler.begin_answer(status, headers)
    spoiler.wfile.write(body[: len(body) // 2])
    spoiler.reset()


def loses_the_answer(spoiler: Spoiler) -> None:
    """The server does what it is asked, and nobody hears of it."""
    spoiler.ask(spoiler.body())
    spoiler.reset()


def stalls(spoiler: Spoiler) -> None:
    """Nothing comes back, and the connection stays."""
    spoiler.body()
    spoiler.server.over.wait(20)
    spoiler.close_connection = True


def trickles(nbytes_per_s: float) -> Fault:
    """A slow link: bytes keep coming, few at a time, both ways."""

    def wait(nbytes: int, spoiler: Spoiler) -> None:
        spoiler.server.over.wait(nbytes / nbytes_per_s)

    def fault(spoiler: Spoiler) -> None:
        spoiler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STEP_NBYTES)
        body = bytearray()
        while len(body) < spoiler.length and (data := spoiler.rfile.read(min(STEP_NBYTES, spoiler.length - len(body)))):
            body += data
            wait(len(data), spoiler)
        status, headers, answer = spoiler.ask(bytes(body))
        spoiler.begin_answer(status, headers)
        for at in range(0, len(answer), STEP_NBYTES):
            spoiler.wfile.write(answer[at : at + STEP_NBYTES])
            wait(STEP_NBYTES, spoiler)

    return fault


def stalls_in_the_request(spoiler: Spoiler) -> None:
    """Half of the body is taken, and nothing more happens, but the connection stays."""
    spoiler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STEP_NBYTES)
    spoiler.rfile.read(spoiler.length // 2)
    spoiler.server.over.wait(20)
    spoiler.close_connection = True


def stalls_in_the_answer(spoiler: Spoiler) -> None:
    """Half of the answer comes, and nothing more, but the connection stays."""
    status, headers, body = spoiler.ask(spoiler.body())
    spoiler.begin_answer(status, headers)
    spoiler.wfile.write(body[: len(body) // 2])
    spoiler.server.over.wait(20)
    spoiler.close_connection = True


def holds_until(free: threading.Event) -> Fault:
    """Nothing comes back, and nothing goes on, until the event is set; then the connection ends."""

    def fault(spoiler: Spoiler) -> None:
        spoiler.body()
        free.wait(60)
        spoiler.close_connection = True

    return fault


def does_first(what: Callable[[], object]) -> Fault:
    """Something happens at the server, then the request passes."""

    def fault(spoiler: Spoiler) -> None:
        what()
        passes(spoiler)

    return fault


def tells_another_etag(spoiler: Spoiler) -> None:
    """As servers do that encrypt: an ETag that is no checksum."""
    status, headers, body = spoiler.ask(spoiler.body())
    spoiler.tell(status, headers, re.sub(rb"[0-9a-f]{32}", b"0123456789abcdef" * 2, body))


def ends_early(spoiler: Spoiler) -> None:
    """An answer that says it is whole, and is half."""
    status, headers, body = spoiler.ask(spoiler.body())
    spoiler.tell(status, headers, body[: len(body) // 2])


def corrupts_the_request(spoiler: Spoiler) -> None:
    """One bit of the body changes on its way up."""
    spoiler.tell(*spoiler.ask(flipped(spoiler.body())))


def corrupts_the_answer(spoiler: Spoiler) -> None:
    """One bit of the body changes on its way down."""
    status, headers, body = spoiler.ask(spoiler.body())
    spoiler.tell(status, headers, flipped(body))


def flipped(body: bytes) -> bytes:
    at = len(body) // 2
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :] if body else body
