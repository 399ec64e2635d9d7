"""The folder of PEFT beside a checkpoint's shards: proven by what its last file, ``files.json``, says of the others."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dcpsvc.errors import FormatError, StoreNotFoundError
from dcpsvc.format.digest import digest
from dcpsvc.format.parse import Fields
from dcpsvc.format.seal import check_seal

if TYPE_CHECKING:
    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Store

LIST = "files.json"
"""Written last: a folder without it is none yet."""

_MAX_LIST_NBYTES = 1 << 20
_MAX_NBYTES = 1 << 34
_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*/)?adapter_(config\.json|model\.safetensors)")
"""Nothing else is read on the list's word; it cannot leave the folder."""
_DIGEST = re.compile(r"[0-9a-f]{32}")


def names(store: Store, attempt: Attempt) -> list[str]:
    """The files of a checkpoint's folder, its list last; none if there is no folder.

    Raises:
        FormatError: The list is damaged, or is another checkpoint's.
        StoreError: The store did not answer.
    """
    found = _read_list(store, attempt)
    return [*found, LIST] if found else []


def read(store: Store, attempt: Attempt, name: str) -> bytes:
    """A file of the folder, proven.

    Raises:
        FormatError: It is not what the list says.
        StoreError: The store did not answer.
    """
    if name == LIST:
        return store.get(attempt.adapter + LIST, max_nbytes=_MAX_LIST_NBYTES)
    nbytes, said = _read_list(store, attempt)[name]
    key = attempt.adapter + name
    try:
        if (size := store.size(key)) != nbytes:
            raise FormatError(key, f"has {size} bytes, {LIST} says {nbytes} ({store.url})")
        data = store.get(key, max_nbytes=nbytes)
    except StoreNotFoundError as err:
        raise FormatError(key, f"the file is missing ({store.url})") from err
    if digest(data) != said:
        raise FormatError(key, f"its bytes do not match {LIST} ({store.url})")
    return data


def problems(store: Store, attempt: Attempt) -> list[str]:
    """What is wrong with it, a sentence for each file; none if nothing is, or there is no folder."""
    found: list[str] = []
    try:
        listed = names(store, attempt)
    except FormatError as err:
        return [str(err)]
    for name in listed:
        try:
            read(store, attempt, name)
        except FormatError as err:
            found.append(str(err))
    return found


def _read_list(store: Store, attempt: Attempt) -> dict[str, tuple[int, str]]:
    key = attempt.adapter + LIST
    try:
        data = store.get(key, max_nbytes=_MAX_LIST_NBYTES)
    except StoreNotFoundError:
        return {}
    fields = Fields.parse(key, data, FormatError)
    check_seal(fields)
    if (fields.get("step", int), fields.get("attempt", str)) != (attempt.step, attempt.attempt):
        raise fields.fail("it is of another checkpoint")
    files = fields.child("files")
    if odd := next((name for name, _ in files.items() if not _NAME.fullmatch(name)), None):
        raise fields.fail(f"it names {odd[:200]!r}, which is no file of such a folder")
    named = {name: files.child(name) for name, _ in files.items()}
    return {
        name: (each.count("nbytes", _MAX_NBYTES), each.text("digest", _DIGEST.fullmatch))
        for name, each in named.items()
    }
