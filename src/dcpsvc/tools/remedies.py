"""What somebody can do about a store that said no: not the same for a directory and for an object store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpsvc.errors import NoBucketError, StoreAccessError, StoreFullError, StoreUnavailableError

if TYPE_CHECKING:
    from dcpsvc.errors import StoreError

_S3 = ("s3://", "s3a://")
_DIRECTORY, _BUCKET, _OTHER = range(3)
_ACCESS = (
    "give this user write permission there, or mount it read-write; commands that only read work without",
    "check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE, -o key=... -o secret=...) and what their policy allows",
    "check the credentials that this protocol takes (-o KEY=VALUE), and what they allow",
)
_NO_BUCKET = (
    "",
    "create the bucket, or correct its name, or the endpoint (AWS_ENDPOINT_URL, -o endpoint_url=...)",
    "create the bucket, or correct its name",
)
_FULL = ("free room there, or raise the quota", "raise the quota of the bucket or the user", "free room there")
_UNAVAILABLE = (
    "see that the file system is mounted and its server answers, then try again",
    "check the network and the endpoint (AWS_ENDPOINT_URL, -o endpoint_url=...), then try again",
    "check the network and the URL, then try again",
)
_TEXTS = (
    (NoBucketError, _NO_BUCKET),
    (StoreAccessError, _ACCESS),
    (StoreFullError, _FULL),
    (StoreUnavailableError, _UNAVAILABLE),
)


def remedy(err: StoreError) -> str:
    """One line, by the kind of the error and of the place; empty where there is nothing to advise."""
    texts = next((texts for kind, texts in _TEXTS if isinstance(err, kind)), ("", "", ""))
    return texts[_kind(err.where)]


def reach(url: str) -> str:
    """As :func:`remedy` of a StoreUnavailableError at a place."""
    return _UNAVAILABLE[_kind(url)]


def _kind(where: str) -> int:
    if where.startswith(_S3):
        return _BUCKET
    return _OTHER if "://" in where else _DIRECTORY
