"""A large local file to one S3 object: parts under way side by side, each proven by the server, all or nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dcpsvc.errors import StoreUnavailableError
from dcpsvc.storage.direct import Request
from dcpsvc.storage.oserror import local_file_error
from dcpsvc.storage.remoteerror import answer_of, from_remote_error

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from dcpsvc.config import Limits
    from dcpsvc.storage.bodysum import BodySum
    from dcpsvc.storage.direct import Direct
    from dcpsvc.storage.pace import Pace
    from dcpsvc.storage.retry import Retry

_MAX_PARTS = 10_000
_CONTROL_S = 180.0
_PAGE_NBYTES = 2**20
_log = logging.getLogger(__name__)


class Span(NamedTuple):
    """The bytes of one part."""

    number: int
    begin: int
    end: int


class Part(NamedTuple):
    """One part as the server has it."""

    number: int
    nbytes: int
    etag: str
    checksum: str


@dataclass(slots=True)
class Sender:
    """Sends files to one server.

    Attributes:
        fs: s3fs, for what carries no data.
        direct: For the data.
        pace: Of this process.
        limits: Concurrency, and the size of a part.
        retry: Of one part.
        checksum: The kind that the server compares; None: it compares none.
    """

    fs: Any
    direct: Direct
    pace: Pace
    limits: Limits
    retry: Callable[[], Retry]
    checksum: BodySum | None

    def send(
        self,
        path: str,
        source: Path,
        nbytes: int,
        sent: Callable[[int], None],
        check: Callable[[int, memoryview], None],
    ) -> None:
        """Carry a file to an object. Holds at most ``concurrency`` parts in memory.

        Raises:
            DcpsvcError: What ``check`` or ``sent`` raises.
            StoreError: A part did not get through in time, or what stands there now is not what was sent.
            Exception: Anything the client libraries raise. Nothing of the object is there, then.
        """
        part_nbytes = max(self.limits.part_nbytes, -(-nbytes // _MAX_PARTS // _PAGE_NBYTES) * _PAGE_NBYTES)
        try:
            descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as err:
            raise local_file_error(path, source, err) from err
        try:
            reading = _Reading(path, source, descriptor, check)
            if nbytes <= part_nbytes:
                parts = [self._send_one(Request(path, "put_object"), reading, Span(1, 0, nbytes), bytearray(nbytes))]
                sent(nbytes)
                assembled = False
            else:
                parts = self._send_parts(path, reading, nbytes, part_nbytes, sent)
                assembled = True
        finally:
            os.close(descriptor)
        self._check_whole(path, nbytes, parts if assembled else [])

    def _send_parts(
        self, path: str, reading: _Reading, nbytes: int, part_nbytes: int, sent: Callable[[int], None]
    ) -> list[Part]:
        upload = self.checksum.upload if self.checksum else {}
        upload_id: str = self._call("create_multipart_upload", path, **upload)["UploadId"]
        work = _Work(nbytes, part_nbytes, sent)

        def carry() -> None:
            buffer = bytearray(part_nbytes)
            with work.failing():
                for span in work:
                    here = {"UploadId": upload_id, "PartNumber": span.number}
                    work.done(self._send_one(Request(path, "upload_part", here), reading, span, buffer))

        try:
            count = min(self.limits.concurrency, -(-nbytes // part_nbytes))
            with ThreadPoolExecutor(count, thread_name_prefix="dcpsvc-part") as pool:
                for carrying in [pool.submit(carry) for _ in range(count)]:
                    carrying.result()
            self._complete(path, upload_id, work.parts)
        except BaseException:
            self._abort(path, upload_id)
            raise
        return work.parts

    def _send_one(self, request: Request, reading: _Reading, span: Span, buffer: bytearray) -> Part:
        body = memoryview(buffer)[: span.end - span.begin]
        reading.fill(span.begin, body)
        checksum = (self.checksum, self.checksum.of(body)) if self.checksum else None

        def attempt() -> str:
            with self.pace.turn(len(body)):
                try:
                    return self.direct.put(request, body, checksum)
                except Exception as err:  # every library below has an error tree of its own
                    raise from_remote_error("put_file", f"s3://{request.path}", err) from err

        etag = self.retry().run(attempt)
        return Part(span.number, len(body), etag, checksum[1] if checksum else "")

    def _complete(self, path: str, upload_id: str, parts: list[Part]) -> None:
        kind = self.checksum
        listed = [
            {"PartNumber": part.number, "ETag": part.etag, **(kind.listed(part.checksum) if kind else {})}
            for part in parts
        ]
        request = {"UploadId": upload_id, "MultipartUpload": {"Parts": listed}}

        def attempt() -> None:
            try:
                self._call("complete_multipart_upload", path, **request)
            except Exception as err:
                # A completion whose answer was lost: whether it happened, the object itself will tell.
                if not (_is_gone(err) and self._is_whole(path, parts)):
                    raise from_remote_error("put_file", f"s3://{path}", err) from err

        self.retry().run(attempt)

    def _is_whole(self, path: str, parts: list[Part]) -> bool:
        with contextlib.suppress(Exception):
            self._check_whole(path, sum(part.nbytes for part in parts), parts)
            return True
        return False

    def _check_whole(self, path: str, nbytes: int, parts: list[Part]) -> None:
        """Size, and checksum of the whole where the server keeps one."""
        found = self._call("head_object", path, **({"ChecksumMode": "ENABLED"} if self.checksum else {}))
        if found["ContentLength"] != nbytes:
            reason = f"{found['ContentLength']} bytes went over where {nbytes} were expected"
            raise StoreUnavailableError("put_file", f"s3://{path}", reason)
        if parts and self.checksum:
            for name, possible in self.checksum.whole([(part.checksum, part.nbytes) for part in parts]).items():
                if found.get(name, "") not in {"", *possible}:
                    raise StoreUnavailableError("put_file", f"s3://{path}", "its checksum is not that of what was sent")

    def _abort(self, path: str, upload_id: str) -> None:
        try:
            self._call("abort_multipart_upload", path, UploadId=upload_id)
        except Exception as err:  # noqa: BLE001 - it must not hide why; what stays is found by remove_unfinished
            _log.warning("event=multipart_stays key=%s error=%s", path, type(err).__name__)

    def _call(self, operation: str, path: str, **parameters: object) -> Any:
        bucket, _, key = path.partition("/")
        return self.fs.call_s3(operation, Bucket=bucket, Key=key, timeout=_CONTROL_S, **parameters)


class _Reading:
    """The local file, and what its bytes should be."""

    def __init__(self, path: str, source: Path, descriptor: int, check: Callable[[int, memoryview], None]) -> None:
        self._path, self._source, self._descriptor, self._check = path, source, descriptor, check

    def fill(self, begin: int, body: memoryview) -> None:
        at = 0
        while at < len(body):
            try:
                count = os.preadv(self._descriptor, [body[at:]], begin + at)
            except OSError as err:
                raise local_file_error(self._path, self._source, err) from err
            if not count:
                raise StoreUnavailableError("put_file", f"s3://{self._path}", f"{self._source} became shorter")
            at += count
        self._check(begin, body)


class _Work:
    """The parts that are still to be sent. Several threads take from it; after a failure nobody gets another."""

    def __init__(self, nbytes: int, part_nbytes: int, sent: Callable[[int], None]) -> None:
        starts = enumerate(range(0, nbytes, part_nbytes), 1)
        self._spans = iter([Span(number, at, min(at + part_nbytes, nbytes)) for number, at in starts])
        self._parts: list[Part] = []
        self._sent, self._nbytes = sent, 0
        self._failed, self._lock = False, threading.Lock()

    def __iter__(self) -> Iterator[Span]:
        while True:
            with self._lock:
                span = None if self._failed else next(self._spans, None)
            if span is None:
                return
            yield span

    @property
    def parts(self) -> list[Part]:
        return sorted(self._parts)

    def done(self, part: Part) -> None:
        with self._lock:
            self._parts.append(part)
            self._nbytes += part.nbytes
            self._sent(self._nbytes)

    @contextlib.contextmanager
    def failing(self) -> Generator[None]:
        try:
            yield
        except BaseException:
            self._failed = True
            raise


def _is_gone(err: Exception) -> bool:
    answer = answer_of(err)
    return isinstance(err, FileNotFoundError) or (answer is not None and answer.code == "NoSuchUpload")
