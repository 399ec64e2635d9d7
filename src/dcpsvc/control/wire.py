"""What client and server say to each other: one JSON object a line, one command a connection.

::

    client  {"v": 1, "command": "status"}                   or save, abort, {"command": "stop", "save": true}
    server  {"v": 1, "event": "hello", "rank": 0, "pid": 4711}
            {"v": 1, "event": "agreed", "step": 42}         none, one or several
            {"v": 1, "event": "done", "answer": {...}}      or {"event": "failed", "error": TYPE, "text": WHY}

Then the server closes. A client that closes first is not waited for; what it asked for still stands.
"""

from __future__ import annotations

import json
from typing import Any

VERSION = 1
MAX_REQUEST_NBYTES = 4096
MAX_REPLY_NBYTES = 1 << 20


class ProtocolError(Exception):
    """A line that is not of this protocol; the text says why."""


def encode(message: dict[str, Any]) -> bytes:
    """A message as a line.

    Raises:
        TypeError: It holds something that is not JSON-like.
    """
    return json.dumps({"v": VERSION} | message).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The message in a line.

    Raises:
        ProtocolError: It is none, or of another version.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise ProtocolError("not a line of JSON") from None
    if not isinstance(message, dict):
        raise ProtocolError("not a JSON object")
    if message.get("v") != VERSION:
        raise ProtocolError(f"version {str(message.get('v'))[:20]} of the protocol; this process speaks {VERSION}")
    return message
