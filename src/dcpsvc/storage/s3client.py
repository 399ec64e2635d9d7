"""Clients of S3 servers, kept for as long as the process lives: making one takes as long as reading 30 MiB."""

from __future__ import annotations

import functools
import json
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from dcpsvc.storage.direct import Direct

if TYPE_CHECKING:
    from collections.abc import Mapping

RENEWED = frozenset({"assume-role", "assume-role-with-web-identity", "container-role", "custom-process", "iam-role"})
"""Sources of temporary credentials that botocore asks again before they end."""

_STAY = RENEWED | {"explicit", "env"}
"""Sources of credentials that do not change without the options, or the environment, or botocore knowing."""

_ONLY_BY_S3FS = frozenset({"RequestPayer", "SSECustomerAlgorithm", "SSECustomerKey", "SSECustomerKeyMD5"})
"""Options that every request for data must repeat; s3fs knows how."""

_ENVIRONMENT = ("AWS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "FSSPEC_")
_KEPT = 8


class Client(NamedTuple):
    """What speaks to one server with one set of credentials. Any thread.

    Attributes:
        fs: An s3fs file system.
        direct: For data; None where the options need s3fs's own way.
        extra: Every new object is to have what s3fs adds.
    """

    fs: Any
    direct: Direct | None
    extra: bool


_clients: dict[tuple[int, str], Client] = {}
"""By process, for a forked child must not speak on its parent's connections, and by all that makes one."""


def client(url: str, options: Mapping[str, Any]) -> tuple[Client, str]:
    """The client for a URL, and the run root as a path on it. Nothing is sent.

    The one that was made for the same options and environment before, unless its credentials came from a file, which
    somebody may have written anew.
    """
    key = _key(options)
    found = _clients.get(key) if key else None
    if found is None or not _stays(found.fs) or "?" in url:
        found = _made(url, options)
        if key and "?" not in url:
            _keep(key, found)
    return found, cast("str", found.fs._strip_protocol(url)).rstrip("/")  # noqa: SLF001 - as fsspec calls it


def _key(options: Mapping[str, Any]) -> tuple[int, str] | None:
    around = {name: value for name, value in os.environ.items() if name.upper().startswith(_ENVIRONMENT)}
    try:
        return os.getpid(), json.dumps([options, around], sort_keys=True)
    except (TypeError, ValueError):  # something of the user's own, such as a session
        return None


def _keep(key: tuple[int, str], made: Client) -> None:
    _clients[key] = made
    mine = [one for one in list(_clients) if one[0] == key[0]]
    for one in mine[:-_KEPT]:
        _clients.pop(one, None)


def _stays(fs: Any) -> bool:
    if fs._s3 is None:  # noqa: SLF001 - asking for `s3` would connect
        return True
    found = credentials(fs)
    return found is None or found.method in _STAY


def credentials(fs: Any) -> Any:
    """What a connected file system signs with; None if it does not."""
    return fs.s3._request_signer._credentials  # noqa: SLF001 - botocore has no other way to ask


def _made(url: str, options: Mapping[str, Any]) -> Client:
    core: Any = import_module("fsspec.core")
    fs = core.url_to_fs(url, skip_instance_cache=True, **options)[0]
    # s3fs's own loop around botocore's would multiply every timeout by five.
    fs.retries = 1
    if fs.session is None and not fs.kwargs:
        fs.session = _session()
    about: Mapping[str, Any] = options.get("client_kwargs") or {}
    endpoint = options.get("endpoint_url") or about.get("endpoint_url")
    extra = {*(options.get("s3_additional_kwargs") or {}), *(fs.req_kw or {})}
    direct = None
    if not extra & _ONLY_BY_S3FS:
        direct = Direct(fs, options["config_kwargs"], endpoint_url=endpoint, verify=about.get("verify"))
    return Client(fs, direct, bool(extra))


@functools.cache
def _service_models() -> Any:
    """What botocore knows about S3. Reading it takes a tenth of a second and more; once a process is enough."""
    return import_module("aiobotocore.session").AioSession().get_component("data_loader")


def _session() -> Any:
    session = import_module("aiobotocore.session").AioSession()
    session.register_component("data_loader", _service_models())
    return session
