"""What a key, a prefix and a temporary name look like, and how a URL is shown to people."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dcpsvc.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

_TEMP = ".tmp-"
MAX_KEY_NBYTES = 900
"""S3 allows 1024 bytes for a whole key; the rest is left to the run root's own prefix."""


def check_key(operation: str, key: str) -> tuple[str, ...]:
    """The components of a key.

    Raises:
        StoreError: The key is not a plain relative path, so it could leave the run root or mean
            different objects in different stores.
    """
    parts = tuple(key.split("/"))
    if reason := _key_problem(key, parts):
        raise StoreError(operation, ascii(key), f"not a key: {reason}")
    return parts


def check_prefix(operation: str, prefix: str) -> tuple[str, ...]:
    """The components of a folder such as ``"manifests/"``; none for ``""``, the whole run root.

    Raises:
        StoreError: The prefix does not name a folder below the run root.
    """
    if not prefix:
        return ()
    if not prefix.endswith("/"):
        raise StoreError(operation, ascii(prefix), "not a prefix: it must end with '/'")
    return check_key(operation, prefix[:-1])


def temp_name() -> str:
    """A fresh name for an unfinished object; no key may look like it and no listing shows it."""
    return f"{_TEMP}{uuid.uuid4().hex}"


def is_temp(name: str) -> bool:
    """Whether the last component of a path belongs to an unfinished object."""
    return name.startswith(_TEMP)


def redact(url: str) -> str:
    """A URL without user name, password, query and fragment: fit for a log and an error."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _key_problem(key: str, parts: Sequence[str]) -> str:
    if not all(parts):
        return "a component is empty"
    if any(part in {".", ".."} for part in parts):
        return "'.' and '..' are not allowed"
    if any(is_temp(part) for part in parts):
        return f"names that begin with {_TEMP!r} are for unfinished objects"
    if "\\" in key or "\0" in key:
        return "backslash and NUL are not allowed"
    try:
        nbytes = len(key.encode())
    except UnicodeEncodeError:
        return "it is not valid text"
    return f"{nbytes} bytes, and at most {MAX_KEY_NBYTES} are allowed" if nbytes > MAX_KEY_NBYTES else ""
