"""S3: s3fs for everything that carries no data, our own connections for the data."""

from __future__ import annotations

import errno
import functools
import os
import threading
from typing import TYPE_CHECKING, Any

from dcpsvc.storage import s3client
from dcpsvc.storage.base import Credentials
from dcpsvc.storage.bodysum import candidates
from dcpsvc.storage.direct import Request
from dcpsvc.storage.multipart import Sender
from dcpsvc.storage.names import temp_name
from dcpsvc.storage.pace import Pace
from dcpsvc.storage.rates import Rates
from dcpsvc.storage.remoteerror import answer_of, from_remote_error
from dcpsvc.storage.retry import Retry
from dcpsvc.storage.s3control import CONTROL_S, Control
from dcpsvc.storage.wire import BlobWire

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime

    from dcpsvc.config import Limits
    from dcpsvc.storage.bodysum import BodySum
    from dcpsvc.storage.cargo import Cargo, Carried
    from dcpsvc.storage.direct import Direct
    from dcpsvc.storage.s3client import Client

_SLOWEST_NBYTES_PER_S = 2**20
_MAX_CREATE_NBYTES = 32 * 2**20
_PRECONDITION_FAILED = 412
_NO_SUCH_RANGE = 416
_REFUSED = frozenset({400, 401, 403})
_CONNECTIONS = 32
_ENDLESS = 10**9

_S3_CONFIG: Mapping[str, object] = {
    "connect_timeout": 5,
    "read_timeout": 30,
    # For signed URLs too, where botocore still prefers what newer regions of AWS refuse.
    "signature_version": "s3v4",
    # Of calls that carry no data; RetryingStore goes around the call.
    "retries": {"mode": "standard", "total_max_attempts": 4},
}

_REFUSED_SUM = frozenset({"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "ChecksumMismatch"})
"""What servers say to bytes that do not match the checksum that came with them."""


def s3_options(options: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Storage options with our defaults below them."""
    connections = {"max_pool_connections": max(_CONNECTIONS, 2 * limits.concurrency)}
    config: dict[str, Any] = {**_S3_CONFIG, **connections, **(options.get("config_kwargs") or {})}
    # Listings are never cached: a rank must see what another one wrote a moment ago.
    return {**options, "config_kwargs": config, "use_listings_cache": False}


class S3Wire(BlobWire):
    """Conditional PUT, one LIST a listing, parts that the server proves, and a limit on every call."""

    atomic_create = True
    copies = True

    def __init__(self, client: Client, limits: Limits, stop: threading.Event) -> None:
        super().__init__(client.fs)
        self._limits, self._stop = limits, stop
        self._pace, self._rates = Pace(limits, pause=stop.wait), Rates()
        self._checksum: tuple[BodySum | None] | None = None
        self._probing = threading.Lock()
        self._extra, self._direct = client.extra, client.direct
        self._control = Control(client.fs)

    def create(self, path: str, data: bytes) -> bool:
        """See :class:`Wire`; a single PUT, the only conditional write that S3 servers agree about."""
        if len(data) > _MAX_CREATE_NBYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        try:
            self._fs.pipe_file(path, data, mode="create", chunksize=_MAX_CREATE_NBYTES, **self._within(len(data)))
        except OSError as err:
            # FileExistsError only where the server names the condition that failed; AWS does, Ceph does not.
            answer = answer_of(err)
            if isinstance(err, FileExistsError) or (answer and answer.status == _PRECONDITION_FAILED):
                return False
            raise
        return True

    def put_file(self, path: str, cargo: Cargo, nbytes: int) -> Carried:
        """See :class:`Wire`."""
        # What is said about a new object (encryption, storage class) s3fs adds, and not to a signed URL.
        if self._direct is None or (self._extra and nbytes <= self._limits.part_nbytes):
            return super().put_file(path, cargo, nbytes)
        checksum = self._proving(self._direct, path)
        retry = functools.partial(Retry, tries=_ENDLESS, deadline_s=self._limits.patience_s, stop=self._stop)
        sender = Sender(self._control, self._direct, self._pace, self._limits, retry, self._rates, checksum)
        return sender.send(path, cargo, nbytes)

    def read_into(self, path: str, begin: int, views: Sequence[memoryview]) -> int:
        """See :class:`Wire`."""
        if self._direct is None:
            return super().read_into(path, begin, views)
        with self._pace.turn(sum(map(len, views))):
            try:
                return self._direct.read_into(path, begin, views)
            except Exception as err:  # every library below has an error tree of its own
                raise from_remote_error("read", f"s3://{path}", err) from err

    def read_rest(self, path: str, begin: int, max_nbytes: int) -> tuple[int, bytes]:
        """See :class:`Wire`."""
        if self._direct is None:
            return super().read_rest(path, begin, max_nbytes)
        try:
            return self._direct.read_rest(path, begin, max_nbytes)
        except Exception as err:  # every library below has an error tree of its own
            answer = answer_of(err)
            if answer and answer.status == _NO_SUCH_RANGE:
                return self.size(path), b""
            raise

    def size(self, path: str) -> int:
        """See :class:`Wire`."""
        try:
            return super().size(path)
        except FileNotFoundError:
            raise
        except Exception as err:  # every library below has an error tree of its own
            # The answer to a HEAD has no body, so it cannot say why; that to a GET has one.
            answer = answer_of(err)
            if answer and answer.status in _REFUSED:
                self._fs.cat_file(path, start=0, end=1, **self._within(0))
            raise

    def is_file(self, path: str) -> bool:
        """See :class:`Wire`; a bucket is none."""
        return "/" in path and bool(self._control.head(path))

    def listing(self, root: str, prefix: str) -> Iterator[tuple[str, int]]:
        """See :class:`Wire`; a request for each page, and FileNotFoundError where there is no such bucket."""
        after = ""
        while True:
            found, after = self.page(root, prefix, after)
            yield from found
            if not after:
                return

    def page(self, root: str, prefix: str, after: str) -> tuple[list[tuple[str, int]], str]:
        """See :class:`Wire`."""
        return self._control.names(f"{root}/{prefix}", after)

    def credentials(self) -> Credentials | None:
        """See :class:`Wire`."""
        self._fs.connect()
        found = s3client.credentials(self._fs)
        if found is None:
            return None
        ends = getattr(found, "_expiry_time", None)
        return Credentials(
            kind=str(found.method or "given"),
            ends_s=None if ends is None else ends.timestamp(),
            renewed=found.method in s3client.RENEWED,
            temporary=ends is not None or bool(found.token),
        )

    def written_s(self, path: str) -> float | None:
        """See :class:`Wire`."""
        written: datetime | None = self._control.head(path).get("LastModified")
        return None if written is None else written.timestamp()

    def remove_unfinished(self, root: str, before_s: float, *, dry_run: bool) -> int:
        """See :class:`Wire`: multipart uploads below the run root that began before that time."""
        found = [one for one in self._control.unfinished(f"{root}/") if one["Initiated"].timestamp() < before_s]
        for upload in () if dry_run else found:
            self._control.abort(f"{root.partition('/')[0]}/{upload['Key']}", str(upload["UploadId"]))
        return len(found)

    def _proving(self, direct: Direct, path: str) -> BodySum | None:
        """The cheapest checksum that this server compares; found out once."""
        with self._probing:
            if self._checksum is None:
                place = f"{path.rpartition('/')[0]}/{temp_name()}"
                self._checksum = (next((kind for kind in candidates() if self._compares(direct, place, kind)), None),)
            return self._checksum[0]

    def _compares(self, direct: Direct, place: str, kind: BodySum) -> bool:
        """Whether it refuses bytes with the checksum of others."""
        try:
            direct.put(Request(place, "put_object"), memoryview(b"these bytes"), (kind, kind.of(b"not those")))
        except Exception as err:  # likewise
            answer = answer_of(err)
            if answer and (answer.code in _REFUSED_SUM):
                return True
            if answer and answer.code in {"InvalidRequest", "NotImplemented", "InvalidArgument"}:
                return False
            raise
        self._fs.rm_file(place, **self._within(0))
        return False

    def _within(self, nbytes: int) -> dict[str, Any]:
        return {"timeout": CONTROL_S + nbytes / _SLOWEST_NBYTES_PER_S}
