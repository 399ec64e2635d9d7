"""The requests to an S3 server that carry no data, in botocore's words; s3fs sends them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from dcpsvc.storage.remoteerror import answer_of, from_remote_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dcpsvc.storage.parts import Span

CONTROL_S = 180.0
"""No such request may take longer, not even with a server that accepts a connection and then says nothing."""

_log = logging.getLogger(__name__)


class Control:
    """Of one server. A path is ``bucket/key``; every method may raise anything.

    Args:
        fs: An s3fs file system.
    """

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def head(self, path: str, **parameters: object) -> Mapping[str, Any]:
        """What an object is."""
        return dict(self._call("head_object", path, **parameters))

    def begin(self, path: str, **parameters: object) -> str:
        """Begin a multipart upload; its id."""
        return str(self._call("create_multipart_upload", path, **parameters)["UploadId"])

    def complete(self, path: str, upload_id: str, parts: Sequence[Mapping[str, object]]) -> None:
        """Make an object of the parts."""
        self._call("complete_multipart_upload", path, UploadId=upload_id, MultipartUpload={"Parts": parts})

    def abort(self, path: str, upload_id: str) -> None:
        """Forget a multipart upload. Never raises: it must not hide why, and what stays is found later."""
        try:
            self._call("abort_multipart_upload", path, UploadId=upload_id)
        except Exception as err:  # noqa: BLE001 - see above
            if not is_gone(err):
                _log.warning("event=multipart_stays key=%s error=%s", path, type(err).__name__)

    def copy(self, path: str, upload_id: str, span: Span, source: str) -> Mapping[str, Any]:
        """Make a part of the bytes that another object has at the same place; what the server says about it.

        Raises:
            StoreError: It does not.
        """
        bucket, _, key = source.partition("/")
        try:
            answer = self._call(
                "upload_part_copy",
                path,
                UploadId=upload_id,
                PartNumber=span.number,
                CopySource={"Bucket": bucket, "Key": key},
                CopySourceRange=f"bytes={span.begin}-{span.end - 1}",
            )
        except Exception as err:  # every library below has an error tree of its own
            raise from_remote_error("put_file", f"s3://{path}", err) from err
        return dict(answer.get("CopyPartResult") or {})  # nothing, where the server knows no copying

    def names(self, path: str, after: str) -> tuple[list[tuple[str, int]], str]:
        """A page of the objects whose path begins so, with their sizes; and what to ask for the next one with."""
        bucket, _, key = path.partition("/")
        more = {"ContinuationToken": after} if after else {}
        page = self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, **more, timeout=CONTROL_S)
        found = [(f"{bucket}/{one['Key']}", int(one["Size"])) for one in page.get("Contents") or []]
        return found, str(page["NextContinuationToken"]) if page.get("IsTruncated") else ""

    def unfinished(self, path: str) -> Iterator[Mapping[str, Any]]:
        """Multipart uploads to objects whose path begins so."""
        for page in self._pages("list_multipart_uploads", path, ("KeyMarker", "UploadIdMarker"), {}):
            yield from page.get("Uploads") or []

    def parts(self, path: str, upload_id: str) -> Iterator[Mapping[str, Any]]:
        """What a multipart upload has so far."""
        for page in self._pages("list_parts", path, ("PartNumberMarker",), {"UploadId": upload_id}):
            yield from page.get("Parts") or []

    def part(self, path: str, upload_id: str, number: int) -> Mapping[str, Any]:
        """What a multipart upload has as one part; empty if it has none."""
        found = self._call("list_parts", path, UploadId=upload_id, PartNumberMarker=number - 1, MaxParts=1)
        return next((dict(part) for part in found.get("Parts") or [] if part["PartNumber"] == number), {})

    def _pages(
        self, operation: str, path: str, markers: Sequence[str], parameters: Mapping[str, object]
    ) -> Iterator[Mapping[str, Any]]:
        bucket, _, key = path.partition("/")
        where = {"Prefix": key} if operation == "list_multipart_uploads" else {"Key": key}
        after: dict[str, object] = {}
        while True:
            page = self._fs.call_s3(operation, Bucket=bucket, **where, **parameters, **after, timeout=CONTROL_S)
            yield page
            if not page.get("IsTruncated"):
                return
            after = {name: page[f"Next{name}"] for name in markers}

    def _call(self, operation: str, path: str, **parameters: object) -> Any:
        bucket, _, key = path.partition("/")
        return self._fs.call_s3(operation, Bucket=bucket, Key=key, timeout=CONTROL_S, **parameters)


def is_gone(err: Exception) -> bool:
    """Whether the server knows no such upload, any more."""
    answer = answer_of(err)
    return isinstance(err, FileNotFoundError) or (answer is not None and answer.code == "NoSuchUpload")
