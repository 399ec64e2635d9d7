"""A digest over a whole JSON document, inside it: a flipped bit anywhere is noticed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from dcpsvc.format.digest import digest
from dcpsvc.format.parse import compact, dump

if TYPE_CHECKING:
    from dcpsvc.format.parse import Fields

_DIGEST = re.compile(r"[0-9a-f]{32}")


def seal(document: dict[str, Any]) -> bytes:
    """The document with a digest over all of it."""
    return dump(document | {"digest": digest(compact(document))})


def check_seal(fields: Fields) -> None:
    """Raise the fields' own error where the digest does not match the rest."""
    said = fields.text("digest", _DIGEST.fullmatch)
    content = {name: value for name, value in fields.items() if name != "digest"}
    try:
        found = digest(compact(content))
    except (ValueError, RecursionError) as err:
        raise fields.fail(f"cannot be sealed: {err}") from err
    if found != said:
        raise fields.fail(f"its content has checksum {found}, it says {said}")
