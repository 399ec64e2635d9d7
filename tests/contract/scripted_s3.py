"""A tiny S3 server of one bucket that can be told to misbehave: what no healthy server lets us see."""

from __future__ import annotations

import threading
from base64 import b64encode
from collections import deque
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

    Fault = Callable[["Handler"], None]

SECRET = "hunter2-hunter2"  # noqa: S105  the one that must never show up


class ScriptedS3(ThreadingHTTPServer):
    """Answers truthfully from ``objects`` unless ``faults`` has an entry for the request."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.compares_md5 = False
        self.names_a_page = 1000
        self.faults: deque[Fault | None] = deque()
        self.requests: list[str] = []
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are what this server is for."""

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()

    def reset(self) -> None:
        """Forget all objects, faults and requests."""
        self.objects.clear()
        self.uploads.clear()
        self.compares_md5 = False
        self.names_a_page = 1000
        self.faults.clear()
        self.requests.clear()

    def options(self, **config: object) -> dict[str, object]:
        """Storage options for this server: a single try, so that each request is one line of a test."""
        return {
            "endpoint_url": f"http://127.0.0.1:{self.server_port}",
            "key": "access",
            "secret": SECRET,
            "client_kwargs": {"region_name": "us-east-1"},
            "config_kwargs": {"retries": {"total_max_attempts": 1}, **config},
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedS3

    def log_message(self, *_: object) -> None:  # type: ignore[override]
        """Say nothing."""

    def body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        del self.headers["Content-Length"]
        return data

    def answer(self, status: int, body: bytes = b"", length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("ETag", '"etag"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.body()
        self.answer(status, f"<Error><Code>{code}</Code><Message>said with {SECRET}</Message></Error>".encode())

    def handle_request(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        fault = self.server.faults.popleft() if self.server.faults else None
        if fault:
            fault(self)
        else:
            self.truthful()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815  as http.server has it

    def truthful(self) -> None:
        parts = urlsplit(self.path)
        key = unquote(parts.path).removeprefix("/bucket").lstrip("/")
        query = parse_qs(parts.query, keep_blank_values=True)
        if "uploadId" in query or "uploads" in query:
            self.multipart(key, query)
        elif self.command == "PUT":
            self.store(key)
        elif not key:
            self.listing(query.get("prefix", [""])[0], int(query.get("continuation-token", ["0"])[0]))
        elif self.command == "DELETE":
            self.server.objects.pop(key, None)
            self.answer(204)
        elif key not in self.server.objects:
            self.refuse(404, "NoSuchKey")
        else:
            self.content(self.server.objects[key])

    def multipart(self, key: str, query: dict[str, list[str]]) -> None:
        data, uploads = self.body(), self.server.uploads
        if "uploads" in query:
            upload_id = f"{key}:{len(self.server.requests)}"
            uploads[upload_id] = {}
            self.answer(200, f"<R><UploadId>{upload_id}</UploadId></R>".encode())
            return
        upload_id = query["uploadId"][0]
        if upload_id not in uploads:
            self.answer(404, b"<Error><Code>NoSuchUpload</Code></Error>")
        elif self.command == "PUT" and "x-amz-copy-source" in self.headers:
            self.copy(uploads[upload_id], int(query["partNumber"][0]))
        elif self.command == "PUT":
            if self.is_whole(data):
                uploads[upload_id][int(query["partNumber"][0])] = data
                self.answer(200)
        else:
            sent = uploads.pop(upload_id)
            if self.command == "POST":
                self.server.objects[key] = b"".join(sent[number] for number in sorted(sent))
            self.answer(200 if self.command == "POST" else 204, b"<R></R>" if self.command == "POST" else b"")

    def copy(self, parts: dict[int, bytes], number: int) -> None:
        source = unquote(self.headers["x-amz-copy-source"]).lstrip("/").removeprefix("bucket/")
        first, _, last = self.headers["x-amz-copy-source-range"].removeprefix("bytes=").partition("-")
        parts[number] = self.server.objects[source][int(first) : int(last) + 1]
        etag = md5(parts[number], usedforsecurity=False).hexdigest()
        self.answer(200, f"<CopyPartResult><ETag>&quot;{etag}&quot;</ETag></CopyPartResult>".encode())

    def is_whole(self, data: bytes) -> bool:
        """Compare the checksum that came with the bytes, if this server does such a thing."""
        claimed = self.headers.get("Content-MD5")
        whole = (
            not (self.server.compares_md5 and claimed)
            or b64encode(md5(data, usedforsecurity=False).digest()).decode() == claimed
        )
        if not whole:
            self.answer(400, b"<Error><Code>BadDigest</Code></Error>")
        return whole

    def store(self, key: str) -> None:
        data = self.body()
        if not self.is_whole(data):
            return
        if self.headers.get("If-None-Match") != "*":
            self.server.objects[key] = data
        elif self.server.objects.setdefault(key, data) is not data:
            self.refuse(412, "PreconditionFailed")
            return
        self.answer(200)

    def content(self, data: bytes) -> None:
        asked = self.headers.get("Range")
        if asked is None:
            self.answer(200, data, len(data))
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        begin = int(first)
        found = data[begin : int(last) + 1 if last else None]
        self.answer(206, found) if begin < len(data) else self.refuse(416, "InvalidRange")

    def listing(self, prefix: str, begin: int) -> None:
        found = sorted(item for item in self.server.objects.items() if item[0].startswith(prefix))
        end = begin + self.server.names_a_page
        lines = "".join(f"<Contents><Key>{k}</Key><Size>{len(v)}</Size></Contents>" for k, v in found[begin:end])
        more = f"<NextContinuationToken>{end}</NextContinuationToken>" if end < len(found) else ""
        text = f"<ListBucketResult><IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}{lines}"
        self.answer(200, f"{text}</ListBucketResult>".encode())


def says(status: int, code: str) -> Fault:
    """Answers with an S3 error."""
    return lambda handler: handler.refuse(status, code)


def hangs_up(handler: Handler) -> None:
    """Closes the connection without an answer."""
    handler.body()
    handler.close_connection = True


def stores_and_hangs_up(handler: Handler) -> None:
    """Does what it is asked, and dies before it can say so."""
    key = unquote(urlsplit(handler.path).path).removeprefix("/bucket/")
    handler.server.objects.setdefault(key, handler.body())
    handler.close_connection = True


def stops_half_way(handler: Handler) -> None:
    """Announces more bytes than it sends."""
    handler.answer(206, b"1234", length=10)
    handler.close_connection = True


def says_nothing(handler: Handler) -> None:
    """Keeps the connection and never answers; ends when the client has given up."""
    handler.body()
    handler.rfile.read(1)
    handler.close_connection = True
