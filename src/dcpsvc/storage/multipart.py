"""A large local file to one S3 object: parts under way side by side, each proven by the server, all or nothing.

What the server has already is not sent: parts of an upload to this very key that was cut short, and what an earlier
object has at the same place, which the server copies, while that is no slower than sending. Both count only if their
checksum is that of the local bytes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import StoreError, StoreUnavailableError
from dcpsvc.storage.cargo import Carried
from dcpsvc.storage.direct import Request
from dcpsvc.storage.outgoing import outgoing
from dcpsvc.storage.parts import How, Part, Span, Work, cut
from dcpsvc.storage.remoteerror import from_remote_error
from dcpsvc.storage.s3control import is_gone
from dcpsvc.storage.threads import each

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dcpsvc.config import Limits
    from dcpsvc.storage.bodysum import BodySum
    from dcpsvc.storage.cargo import Cargo
    from dcpsvc.storage.direct import Direct
    from dcpsvc.storage.outgoing import Outgoing
    from dcpsvc.storage.pace import Pace
    from dcpsvc.storage.rates import Rates
    from dcpsvc.storage.retry import Retry
    from dcpsvc.storage.s3control import Control

_COPY_TRIES = 3
_MAX_DOUBTS = 3
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Upload:
    """One multipart upload that has begun.

    Attributes:
        path: Of the object.
        id: As the server calls it.
        arrived: What it has of an earlier try, by part number.
        source: An earlier object that it may copy from; empty once that was refused.
        doubts: Parts of it that were not what they should be.
    """

    path: str
    id: str
    arrived: Mapping[int, Mapping[str, Any]] = field(default_factory=dict[int, "Mapping[str, Any]"])
    source: str = ""
    doubts: int = 0

    def doubt(self, there: Mapping[str, Any] | None) -> None:
        """A part that was not what it should be, if there was one. Several: nothing of that kind can be proven."""
        self.doubts += there is not None
        if self.doubts > _MAX_DOUBTS:
            self.source = ""


@dataclass(slots=True)
class Sender:
    """Sends files to one server.

    Attributes:
        control: For what carries no data.
        direct: For the data.
        pace: Of this process.
        limits: Concurrency, and the size of a part.
        retry: Of one part.
        rates: What parts to this server took so far.
        checksum: The kind that the server compares; None: it compares none.
    """

    control: Control
    direct: Direct
    pace: Pace
    limits: Limits
    retry: Callable[..., Retry]
    rates: Rates
    checksum: BodySum | None

    def send(self, path: str, cargo: Cargo, nbytes: int) -> Carried:
        """Carry a file to an object. Holds at most ``concurrency`` parts in memory.

        Raises:
            DcpsvcError: What ``check`` or ``progress`` raises.
            StoreError: A part did not get through in time, or what stands there now is not what was sent.
            Exception: Anything the client libraries raise. Nothing of the object is there, then.
        """
        with outgoing(path, cargo) as file:
            if nbytes > self.limits.part_nbytes:
                return self._send_parts(path, file, cargo if self.checksum else _without_help(cargo), nbytes)
            body, value = self._read(file, Span(1, 0, nbytes), bytearray(nbytes))
        self._put(Request(path, "put_object"), body, value)
        if cargo.progress:
            cargo.progress(nbytes)
        return Carried(proven=self.checksum is not None)

    def _send_parts(self, path: str, file: Outgoing, cargo: Cargo, nbytes: int) -> Carried:
        earlier = cargo.earlier
        spans = cut(nbytes, self.limits.part_nbytes, earlier.runs if earlier else ())
        upload = (self._cut_short(path, len(spans)) if cargo.may_have_begun else None) or self._begin(path)
        upload.source = earlier.key if earlier else ""
        work = Work(spans, cargo.progress)
        try:
            self._carry(upload, file, work)
            self._complete(upload, work.parts)
            self._check_whole(path, nbytes, work.parts)
        except BaseException as err:  # an interrupt too: what has arrived would stay, and cost
            self.control.abort(path, upload.id)
            # A server that copies, and then does not make an object of it.
            if not (isinstance(err, StoreError) and work.is_done and work.nbytes.keys() - {How.SENT}):
                raise
            _log.warning("event=sent_whole key=%s because=%s", path, err)
            return self._send_parts(path, file, replace(_without_help(cargo), progress=None), nbytes)
        return Carried(self.checksum is not None, work.nbytes[How.COPIED], work.nbytes[How.FOUND])

    def _begin(self, path: str) -> _Upload:
        return _Upload(path, self.control.begin(path, **(self.checksum.upload if self.checksum else {})))

    def _cut_short(self, path: str, count: int) -> _Upload | None:
        """The upload to this very object that never ended. Without the right to look for one there is none."""
        bucket, _, key = path.partition("/")
        try:
            begun = [one for one in self.control.unfinished(path) if one["Key"] == key]
            uploads = [_Upload(path, str(one["UploadId"])) for one in sorted(begun, key=lambda one: one["Initiated"])]
            for upload in uploads:
                upload.arrived = {part["PartNumber"]: part for part in self.control.parts(path, upload.id)}
        except Exception as err:  # noqa: BLE001 - whatever it is: then all is sent
            _log.info("event=unfinished_unknown bucket=%s key=%s error=%s", bucket, key, type(err).__name__)
            return None
        chosen = next((upload for upload in reversed(uploads) if self._fits(upload, count)), None)
        for upload in uploads:
            if upload is not chosen:
                self.control.abort(path, upload.id)
        return chosen

    def _fits(self, upload: _Upload, count: int) -> bool:
        """Whether the object can be made of it: servers take one kind of checksum, and Ceph no part too many."""
        wanted = {self.checksum.field} - {""} if self.checksum else set[str]()
        kinds = [{name for name in part if name.startswith("Checksum")} for part in upload.arrived.values()]
        # Swift compares a checksum and does not keep it; then the ETag of a part says what it is.
        told = wanted if any(kinds) else set[str]()
        return bool(kinds) and max(upload.arrived) <= count and all(kind == told for kind in kinds)

    def _carry(self, upload: _Upload, file: Outgoing, work: Work) -> None:
        def carry(_: int) -> None:
            buffer = bytearray(work.largest_nbytes)
            with work.failing():
                for span in work:
                    work.done(*self._carry_part(upload, span, *self._read(file, span, buffer)))

        count = min(self.limits.concurrency, work.count)
        each(carry, range(count), count)

    def _carry_part(self, upload: _Upload, span: Span, body: memoryview, value: str) -> tuple[Part, How]:
        there, how = upload.arrived.get(span.number), How.FOUND
        if not self._proves(there, body, value):
            there, how = self._copied(upload, span), How.COPIED
        if there is None or not self._proves(there, body, value):
            upload.doubt(there)
            where = {"UploadId": upload.id, "PartNumber": span.number}
            with self.rates.timed(How.SENT, len(body)):
                there, how = {"ETag": self._put(Request(upload.path, "upload_part", where), body, value)}, How.SENT
        return Part(span.number, len(body), str(there["ETag"]), value), how

    def _proves(self, there: Mapping[str, Any] | None, body: memoryview, value: str) -> bool:
        """Whether what the server says about a part it has is true of these bytes, and of no others."""
        if there is None or there.get("Size", len(body)) != len(body):
            return False
        if self.checksum and (theirs := there.get(self.checksum.field)):
            return bool(theirs == value)
        # Where the server encrypts this is no checksum, and fits nothing.
        return str(there.get("ETag", "")).strip('"') == hashlib.md5(body, usedforsecurity=False).hexdigest()

    def _copied(self, upload: _Upload, span: Span) -> Mapping[str, Any] | None:
        """What the server says of its own copy; None if it makes none, or sending is faster."""
        source = upload.source
        # Where a limit is set to what is sent, what is not sent lets other parts go earlier.
        if not (span.unchanged and source and (self.limits.nbytes_per_s or self.rates.copies())):
            return None

        def attempt() -> Mapping[str, Any]:
            with self.pace.turn(0):
                return self.control.copy(upload.path, upload.id, span, source)

        try:
            with self.rates.timed(How.COPIED, span.end - span.begin):
                return self._with_checksum(upload, span, self.retry(tries=_COPY_TRIES).run(attempt))
        except StoreError as err:  # the earlier object was deleted, or may not be read; or the server cannot do it
            _log.info("event=not_copied key=%s because=%s", upload.path, err)
            upload.source = ""
            return None

    def _with_checksum(self, upload: _Upload, span: Span, there: Mapping[str, Any]) -> Mapping[str, Any]:
        """Ceph tells it only when asked; that takes less than to make an MD5 of the bytes."""
        if self.checksum and self.checksum.field and self.checksum.field not in there:
            with contextlib.suppress(Exception):  # whoever may not ask makes the MD5
                return self.control.part(upload.path, upload.id, span.number) or there
        return there

    def _read(self, file: Outgoing, span: Span, buffer: bytearray) -> tuple[memoryview, str]:
        body = file.part(span, buffer)
        return body, self.checksum.of(body) if self.checksum else ""

    def _put(self, request: Request, body: memoryview, value: str) -> str:
        checksum = (self.checksum, value) if self.checksum else None

        def attempt() -> str:
            with self.pace.turn(len(body)):
                try:
                    return self.direct.put(request, body, checksum)
                except Exception as err:  # every library below has an error tree of its own
                    raise from_remote_error("put_file", f"s3://{request.path}", err) from err

        return self.retry().run(attempt)

    def _complete(self, upload: _Upload, parts: list[Part]) -> None:
        listed = [
            {
                "PartNumber": part.number,
                "ETag": part.etag,
                **(self.checksum.listed(part.checksum) if self.checksum else {}),
            }
            for part in parts
        ]

        def attempt() -> None:
            try:
                self.control.complete(upload.path, upload.id, listed)
            except Exception as err:  # every library below has an error tree of its own
                # A completion whose answer was lost: whether it happened, the object itself will tell.
                if not (is_gone(err) and self._is_whole(upload.path, parts)):
                    raise from_remote_error("put_file", f"s3://{upload.path}", err) from err

        self.retry().run(attempt)

    def _is_whole(self, path: str, parts: list[Part]) -> bool:
        with contextlib.suppress(Exception):  # whatever it is, it is not known to be whole
            self._check_whole(path, sum(part.nbytes for part in parts), parts)
            return True
        return False

    def _check_whole(self, path: str, nbytes: int, parts: list[Part]) -> None:
        """Size, and checksum of the whole where the server keeps one."""
        found = self.control.head(path, **({"ChecksumMode": "ENABLED"} if self.checksum else {}))
        wrong = functools.partial(StoreUnavailableError, "put_file", f"s3://{path}")
        if found["ContentLength"] != nbytes:
            raise wrong(f"{found['ContentLength']} bytes went over where {nbytes} were expected")
        if parts and self.checksum:
            for name, possible in self.checksum.whole([(part.checksum, part.nbytes) for part in parts]).items():
                if found.get(name, "") not in {"", *possible}:
                    raise wrong("its checksum is not that of what was sent")


def _without_help(cargo: Cargo) -> Cargo:
    return replace(cargo, earlier=None, may_have_begun=False)
