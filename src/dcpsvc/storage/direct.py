"""Bytes of S3 objects straight between memory and a socket, on the caller's thread.

s3fs signs (credentials, region and addressing are its business); the body goes over a connection of botocore's own HTTP
session. So no byte passes the event loop, a checksum is computed once, and calls into the kernel let other threads run.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from dcpsvc.storage.bodysum import BodySum

_SIGNED_FOR_S = 3600
_SIGNED_AGAIN_AFTER_S = 600.0
_SIGNATURES = 64
_SIGN_WITHIN_S = 60.0
_GET = "get_object"
_CODE = re.compile(rb"<Code>([^<]{1,100})</Code>")
_TOTAL = re.compile(r"/(\d+)$")
_ERROR_NBYTES = 65536
_PIECE_NBYTES = 2**20
_OK = frozenset({200, 206})


class Request(NamedTuple):
    """What to ask the server for, in botocore's words."""

    path: str
    operation: str
    parameters: Mapping[str, object] = {}


class Direct:
    """PUT and GET with URLs that s3fs has signed.

    Args:
        fs: An s3fs file system.
        config: botocore's options: timeouts, proxies.
        endpoint_url: Where the server is, if not at AWS.
        verify: Of the server's certificate, as botocore takes it.
    """

    def __init__(
        self, fs: Any, config: Mapping[str, Any], *, endpoint_url: str | None, verify: bool | str | None
    ) -> None:
        self._fs = fs
        self._signed: dict[str, tuple[float, str]] = {}
        self._requests: Any = import_module("botocore.awsrequest")
        self._errors: Any = import_module("botocore.exceptions")
        environment: Any = import_module("botocore.utils").get_environ_proxies
        self._session: Any = import_module("botocore.httpsession").URLLib3Session(
            verify=(os.environ.get("AWS_CA_BUNDLE") or True) if verify is None else verify,
            proxies=config.get("proxies") or environment(endpoint_url or "https://s3.amazonaws.com"),
            proxies_config=config.get("proxies_config"),
            client_cert=config.get("client_cert"),
            timeout=(config["connect_timeout"], config["read_timeout"]),
            max_pool_connections=config["max_pool_connections"],
        )

    def put(self, request: Request, body: memoryview, checksum: tuple[BodySum, str] | None) -> str:
        """Send a body; the ETag that the server gave it."""
        headers = {"Content-Length": str(len(body))}
        if checksum:
            kind, value = checksum
            request = request._replace(parameters={**request.parameters, **kind.parameters(value)})
            headers |= kind.headers(value)
        answer = self._send("PUT", request, headers, _pieces(body))
        answer.content  # noqa: B018 - reads it, so that the connection can be used again
        return str(answer.headers.get("ETag", ""))

    def read_into(self, path: str, begin: int, views: Sequence[memoryview]) -> int:
        """Fill ``views`` from ``begin`` on; how many bytes there were, fewer where the object is shorter."""
        asked = {"Range": f"bytes={begin}-{begin + sum(map(len, views)) - 1}"}
        with self._answer(path, asked) as raw:
            return sum(_fill(raw, view) for view in views)

    def read_rest(self, path: str, begin: int, max_nbytes: int) -> tuple[int, bytes]:
        """The size of an object, and its bytes from ``begin`` on; none if they are more than ``max_nbytes``."""
        with self._answer(path, {"Range": f"bytes={begin}-"}) as raw:
            # The size of the object, not what this answer says of itself: it may have been cut short and look whole.
            total = _TOTAL.search(raw.headers.get("Content-Range", ""))
            nbytes = int(total[1]) - begin if total else int(raw.headers["Content-Length"])
            data = memoryview(bytearray(nbytes if nbytes <= max_nbytes else 0))
            return begin + nbytes, bytes(data[: _fill(raw, data)])

    @contextlib.contextmanager
    def _answer(self, path: str, headers: dict[str, str]) -> Generator[Any]:
        raw = self._send("GET", Request(path, _GET), headers, None).raw
        try:
            yield raw
        finally:
            if not raw._fp.isclosed():  # noqa: SLF001 - a connection with bytes left on it is of no use to the next one
                raw.close()
            raw.release_conn()

    def _send(self, method: str, request: Request, headers: dict[str, str], body: list[memoryview] | None) -> Any:
        url = self._url(request)
        answer = self._session.send(self._requests.AWSPreparedRequest(method, url, headers, body, method == "GET"))
        if answer.status_code in _OK:
            return answer
        told = cast("bytes", answer.raw.read(_ERROR_NBYTES) if method == "GET" else answer.content)
        code = _CODE.search(told)
        error = {"Code": code[1].decode("ascii", "replace") if code else ""}
        response = {"Error": error, "ResponseMetadata": {"HTTPStatusCode": answer.status_code}}
        self._signed.pop(request.path, None)  # it may be the signature that has become old
        raise self._errors.ClientError(response, request.operation)

    def _url(self, request: Request) -> str:
        """Signed. One for all ranges of an object: signing takes longer than asking."""
        path, operation, parameters = request
        made, url = self._signed.get(path, (-math.inf, ""))
        if operation == _GET and time.monotonic() - made < _SIGNED_AGAIN_AFTER_S:
            return url
        signing = {"expires": _SIGNED_FOR_S, "client_method": operation, "timeout": _SIGN_WITHIN_S}
        url = str(self._fs.url(path, **signing, **parameters))
        if operation == _GET:
            self._signed = {path: (time.monotonic(), url)} | dict(list(self._signed.items())[: _SIGNATURES - 1])
        return url


def _pieces(body: memoryview) -> list[memoryview]:
    """What a socket gets at a time: its timeout is for all of one call, and on a slow link a part takes longer."""
    return [body[at : at + _PIECE_NBYTES] for at in range(0, len(body), _PIECE_NBYTES)]


def _fill(raw: Any, view: memoryview) -> int:
    """From the socket straight into memory: urllib3 itself would copy what it reads twice."""
    body, at = raw._fp, 0  # noqa: SLF001 - http.client's response, which has what urllib3 lacks
    while at < len(view) and (count := body.readinto(view[at:])):
        at += count
    return at
