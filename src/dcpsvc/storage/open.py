"""From what a user writes as the run root to a store."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from dcpsvc.config import outside_a_job
from dcpsvc.errors import RootError, StoreError
from dcpsvc.storage.memory import MemoryStore
from dcpsvc.storage.names import redact
from dcpsvc.storage.posix import PosixStore

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping

    from dcpsvc.config import Limits
    from dcpsvc.storage.base import Store

__all__ = ["open_store", "redact"]

_FILES = frozenset({"file", "local"})
_S3 = frozenset({"s3", "s3a"})
_ONE_SLASH = re.compile(r"[a-z][a-z0-9+.-]+:/(?!/)", re.IGNORECASE)
_NO_PLACE = frozenset({"data", "dir", "generic", "git", "github", "gist", "http", "https", "reference", "tar", "zip"})
"""Protocols of fsspec that cannot be written to, or that are no place of their own."""


def open_store(
    url: str | os.PathLike[str] | Store,
    storage_options: Mapping[str, Any] | None = None,
    *,
    stop: threading.Event | None = None,
    limits: Limits | None = None,
) -> Store:
    """The store for a run root; transient failures are tried again.

    Nothing is written and nothing is sent: a directory need not exist yet, and wrong credentials show at the first
    call.

    Args:
        url: A path, ``file:///path``, ``memory://name``, ``s3://bucket/prefix``, a URL fsspec knows, or a store of your
            own.
        storage_options: What fsspec takes for that protocol, such as ``endpoint_url``, ``key`` and ``secret``.
        stop: Once set, nothing is tried again.
        limits: How hard to work an object store; None: as hard as processes outside a job may together.

    Raises:
        RootError: The URL names no place that can hold a run, or the package for its protocol is missing.
    """
    # tenacity is not needed to only import this module.
    from dcpsvc.storage.retry import RetryingStore

    limits = limits or outside_a_job()
    store = _open(os.fspath(url), storage_options or {}, limits, stop) if isinstance(url, str | os.PathLike) else url
    return RetryingStore(store, stop=stop, deadline_s=limits.patience_s)


def _open(url: str, options: Mapping[str, Any], limits: Limits, stop: threading.Event | None) -> Store:
    if not url:
        raise RootError("run root", "it is empty; give a directory or a URL such as s3://bucket/prefix")
    if "\0" in url:
        raise RootError(ascii(url), "a NUL character cannot be part of a run root")
    if _ONE_SLASH.match(url):  # as a path it would be made here, and filled
        meant = redact(url.replace(":/", "://", 1))
        raise RootError(
            redact(url), f"a URL has two slashes, of which a pathlib.Path drops one; give {meant!r}, a text"
        )
    if "://" not in url:
        return _without_options(url, options, PosixStore(Path(url).expanduser()))
    protocol = url.partition("://")[0].lower()
    if protocol in _FILES:
        return _without_options(url, options, PosixStore(_file_url_path(url)))
    if protocol == "memory":
        return _without_options(url, options, MemoryStore(_memory_name(url)))
    return _open_remote(protocol, url, options, limits, stop)


def _without_options(url: str, options: Mapping[str, Any], store: Store) -> Store:
    if options:
        raise RootError(redact(url), f"it takes no storage_options, and was given {', '.join(sorted(options))}")
    return store


def _file_url_path(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in {"", "localhost"}:
        raise RootError(redact(url), f"a file URL has three slashes; {redact(url)!r} names a machine")
    if not parts.path.startswith("/"):
        raise RootError(redact(url), "a file URL needs an absolute path, such as file:///checkpoints/run")
    return Path(unquote(parts.path))


def _memory_name(url: str) -> str:
    name = url.partition("://")[2].strip("/")
    if not name:
        raise RootError(url, "give it a name, such as memory://experiment")
    return name


def _open_remote(
    protocol: str, url: str, options: Mapping[str, Any], limits: Limits, stop: threading.Event | None
) -> Store:
    shown = redact(url)
    if "::" in url or protocol in _NO_PLACE:
        raise RootError(shown, "not a place that objects can be written to; give a directory or an object store's URL")
    if protocol in _S3:
        _check_bucket(url)
    # The first line here that needs fsspec at all.
    from dcpsvc.storage.objectstore import ObjectStore

    try:
        if protocol not in import_module("fsspec.registry").known_implementations:
            raise RootError(shown, f"{protocol!r} is not a known protocol; give a directory or s3://bucket/prefix")
        return ObjectStore(f"{protocol}://{url.partition('://')[2]}", options, limits=limits, stop=stop)
    except ImportError as err:
        raise RootError(shown, f"the package for {protocol}:// is not installed ({err})") from err
    except StoreError as err:
        raise RootError(shown, f"cannot be opened: {err.reason}") from err


def _check_bucket(url: str) -> None:
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise RootError(redact(url), "credentials do not belong in the URL; put key and secret into storage_options")
    if not parts.netloc:
        raise RootError(redact(url), "it names no bucket; write s3://bucket/prefix")
