"""What ranks bring to a meeting, as text on the store: something JSON-like, or their failure."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import RankFailure

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class LostPeerError(RuntimeError):
    """A collective failed on this rank, and cannot say which of the others is to blame."""


def failures(brought: Iterable[Any]) -> list[RankFailure]:
    """Those among them; causes before consequences."""
    found = [message for message in brought if isinstance(message, RankFailure)]
    return [failure for failure in found if decides(failure)] or found


def decides(message: Any) -> bool:
    """Whether it is a failure that ends the meeting at once."""
    return isinstance(message, RankFailure) and message.error != LostPeerError.__name__


def encode(message: Any) -> str:
    """As it stands under a rank's key."""
    if isinstance(message, RankFailure):
        return json.dumps({"failed": [message.rank, message.phase, message.error, message.text]})
    return json.dumps({"ok": message})


def decode(text: str) -> Any:
    """What :func:`encode` was given."""
    message = json.loads(text)
    return RankFailure(*message["failed"]) if "failed" in message else message["ok"]


def no(failed: Sequence[RankFailure], missing: Sequence[int]) -> str:
    """The verdict of a meeting that did not agree."""
    plain = [[f.rank, f.phase, f.error, f.text] for f in failed]
    return json.dumps({"failures": plain, "missing": list(missing)})
