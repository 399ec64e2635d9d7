"""What the errors of fsspec, s3fs, botocore and their kin mean to somebody who saves a checkpoint.

Known by name, not by import: none of these libraries need be installed, and none is loaded here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple, cast

from dcpsvc.errors import (
    DcpsvcError,
    NoBucketError,
    StoreAccessError,
    StoreError,
    StoreFullError,
    StoreNotFoundError,
    StoreThrottledError,
    StoreUnavailableError,
)
from dcpsvc.storage.oserror import from_os_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


class Answer(NamedTuple):
    """What a server said: its code word ("" if none) and its HTTP status (0 if none)."""

    code: str
    status: int


_CODES: dict[str, tuple[type[StoreError], str]] = {
    "NoSuchKey": (StoreNotFoundError, "there is no such object"),
    # Not StoreNotFoundError: "no object" is an answer, a missing bucket is a mistake.
    "NoSuchBucket": (NoBucketError, "there is no such bucket; it is never created for you"),
    "InvalidBucketName": (StoreError, "that is not a valid bucket name"),
    "AccessDenied": (StoreAccessError, "access denied; these credentials may not do that here"),
    "InvalidAccessKeyId": (StoreAccessError, "the server does not know this access key"),
    "SignatureDoesNotMatch": (StoreAccessError, "the secret key does not fit the access key"),
    "ExpiredToken": (StoreAccessError, "the session token has expired"),
    "InvalidToken": (StoreAccessError, "the session token is not valid"),
    "RequestTimeTooSkewed": (StoreAccessError, "this machine's clock and the server's differ too much"),
    "QuotaExceeded": (StoreFullError, "the storage quota is used up"),
    "XMinioStorageFull": (StoreFullError, "no space left on the server"),
    "InsufficientStorage": (StoreFullError, "no space left on the server"),
    "PreconditionFailed": (StoreError, "the object exists already"),
    "ConditionalRequestConflict": (StoreUnavailableError, "somebody else is writing the same object now"),
    "InvalidRange": (StoreError, "the object is shorter than the bytes asked for"),
    "RequestTimeout": (StoreUnavailableError, "the server waited too long for the request"),
    "SlowDown": (StoreThrottledError, "the server asks to slow down"),
    "Throttling": (StoreThrottledError, "the server asks to slow down"),
    "ThrottlingException": (StoreThrottledError, "the server asks to slow down"),
    "RequestLimitExceeded": (StoreThrottledError, "the server asks to slow down"),
    "TooManyRequests": (StoreThrottledError, "the server asks to slow down"),
    "XAmzContentSHA256Mismatch": (StoreUnavailableError, "the bytes were damaged on their way to the server"),
    "XAmzContentChecksumMismatch": (StoreUnavailableError, "the bytes were damaged on their way to the server"),
    "InvalidPart": (StoreUnavailableError, "the list of parts was damaged on its way to the server"),
    "BadDigest": (StoreUnavailableError, "the bytes were damaged on their way to the server"),
    "IncompleteBody": (StoreUnavailableError, "the bytes did not all arrive at the server"),
    "PermanentRedirect": (StoreError, "the bucket lives in another region; set region_name in storage_options"),
    "AuthorizationHeaderMalformed": (StoreError, "the server expects another region; set region_name"),
}

_DENIED = frozenset({"", "AccessDenied", "403"})
_NEEDS = {
    "create": "s3:PutObject",
    "put": "s3:PutObject, and no policy that forbids plain overwriting",
    "put_file": "s3:PutObject and s3:AbortMultipartUpload",
    "get": "s3:GetObject, and s3:ListBucket to hear that an object is missing",
    "read": "s3:GetObject, and s3:ListBucket to hear that an object is missing",
    "size": "s3:GetObject, and s3:ListBucket to hear that an object is missing",
    "list": "s3:ListBucket",
    "delete": "s3:DeleteObject",
    "remove_unfinished": "s3:ListBucketMultipartUploads and s3:AbortMultipartUpload",
}
"""What an operation takes on S3, for whoever may not do it."""

_STATUSES: dict[int, tuple[type[StoreError], str]] = {
    401: (StoreAccessError, "the server wants other credentials"),
    403: (StoreAccessError, "access denied; these credentials may not do that here"),
    404: (StoreNotFoundError, "there is no such object"),
    408: (StoreUnavailableError, "the server waited too long for the request"),
    409: (StoreUnavailableError, "somebody else is changing the same object now"),
    412: (StoreError, "the object exists already"),
    416: (StoreError, "the object is shorter than the bytes asked for"),
    429: (StoreThrottledError, "the server asks to slow down"),
    501: (StoreError, "the server does not implement this request"),
    507: (StoreFullError, "no space left on the server"),
}
_SERVER_TROUBLE = range(500, 600)
_FAILURES = range(400, 600)

_TYPES: dict[str, tuple[type[StoreError], str]] = {
    "NoCredentialsError": (StoreAccessError, "no credentials found; set them in storage_options or the environment"),
    "PartialCredentialsError": (StoreAccessError, "the credentials are incomplete: access key or secret is missing"),
    "TokenRetrievalError": (StoreAccessError, "the session token cannot be renewed; log in again"),
    "ProfileNotFound": (StoreAccessError, "the named credentials profile does not exist"),
    "CredentialRetrievalError": (StoreAccessError, "the credentials cannot be fetched"),
    "SSLError": (StoreError, "the server's certificate is not trusted, or it does not speak TLS"),
    "EndpointConnectionError": (StoreUnavailableError, "the endpoint cannot be reached; is endpoint_url right?"),
    "ConnectTimeoutError": (StoreUnavailableError, "the endpoint did not accept a connection in time"),
    "ProxyConnectionError": (StoreUnavailableError, "the proxy cannot be reached"),
    "ReadTimeoutError": (StoreUnavailableError, "the server did not answer in time"),
    "FSTimeoutError": (StoreUnavailableError, "the transfer took too long"),
    "ConnectionClosedError": (StoreUnavailableError, "the connection was closed before the answer was whole"),
    "HTTPClientError": (StoreUnavailableError, "the connection failed"),
    "ClientPayloadError": (StoreUnavailableError, "the connection was closed before the answer was whole"),
    "ClientConnectionError": (StoreUnavailableError, "the connection failed"),
    "IncompleteReadError": (StoreUnavailableError, "the connection was closed before the answer was whole"),
    "ProtocolError": (StoreUnavailableError, "the connection was closed before the answer was whole"),
    "ResponseParserError": (StoreUnavailableError, "the server's answer makes no sense"),
}

_SHOWN = frozenset({"endpoint_url", "region_name", "signature_version"})
_SHORTEST_SECRET = 4


def from_remote_error(operation: str, where: str, err: Exception, secrets: Iterable[str] = ()) -> DcpsvcError:
    """The StoreError that says what ``err`` means; to be raised ``from err``.

    Our own sentences wherever the cause is known; a text from outside is shown only after every one of ``secrets``
    is struck out. An error of ours, say from a progress callback, is returned as it is.
    """
    if isinstance(err, DcpsvcError):
        return err
    if meaning := _meaning(err):
        kind, reason = meaning
        answer = answer_of(err)
        if where.startswith("s3") and kind is StoreAccessError and answer and answer.code in _DENIED:
            reason = f"{reason}; it takes {_NEEDS.get(operation, 'a right they lack')}"
        return kind(operation, where, reason)
    if isinstance(err, OSError):
        return from_os_error(operation, where, err)
    return StoreError(operation, where, _strike(f"{type(err).__name__}: {err}", secrets))


def answer_of(err: BaseException) -> Answer | None:
    """What an S3 server said, as botocore hands it on; None if it said nothing."""
    for link in _chain(err):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return _botocore_answer(cast("Mapping[str, object]", response))
    return None


def secrets_in(options: Mapping[str, object]) -> Iterator[str]:
    """Every text in storage options that is not known to be harmless."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from secrets_in(cast("Mapping[str, object]", value))
        elif isinstance(value, str) and name not in _SHOWN and len(value) >= _SHORTEST_SECRET:
            yield value


def _meaning(err: Exception) -> tuple[type[StoreError], str] | None:
    if answer := answer_of(err):
        return _answer_meaning(answer)
    names = (cls.__name__ for link in _chain(err) for cls in type(link).__mro__)
    if name := next((name for name in names if name in _TYPES), None):
        return _TYPES[name]
    # After the types: aiohttp gives a torn answer the status 400, which no server said.
    status = next((status for link in _chain(err) if (status := _http_status(link))), 0)
    return _answer_meaning(Answer("", status)) if status else None


def _answer_meaning(answer: Answer) -> tuple[type[StoreError], str]:
    if known := _CODES.get(answer.code) or _STATUSES.get(answer.status):
        return known
    if answer.status in _SERVER_TROUBLE:
        return StoreUnavailableError, f"the server is in trouble (HTTP {answer.status})"
    return StoreError, f"the server refused the request ({answer.code or 'no reason given'}, HTTP {answer.status})"


def _http_status(err: BaseException) -> int:
    # As the clients of other protocols have it (gcsfs, aiohttp, azure).
    found = (getattr(err, name, None) for name in ("status", "status_code", "code"))
    return next((status for status in found if isinstance(status, int) and status in _FAILURES), 0)


def _botocore_answer(response: Mapping[str, object]) -> Answer:
    error = cast("Mapping[str, object]", response.get("Error") or {})
    meta = cast("Mapping[str, object]", response.get("ResponseMetadata") or {})
    code, status = str(error.get("Code") or ""), meta.get("HTTPStatusCode")
    if isinstance(status, int):
        return Answer(code, status)
    return Answer(code, int(code) if re.fullmatch("[0-9]{3}", code) else 0)


def _chain(err: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = err
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__


def _strike(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
