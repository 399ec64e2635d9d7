"""What a ``dcpsvc verify`` has proven so far, in the user's cache: one that is cut short can be carried on."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dcpsvc.format import digest

if TYPE_CHECKING:
    from types import TracebackType

    from dcpsvc.format.manifest import Manifest, ShardRecord

logger = logging.getLogger("dcpsvc")

BELIEVED_S = 86400.0
"""What was proven longer ago says little about now."""

_STEP_NBYTES = 256 << 20
_MAX_NBYTES = 64 << 20


class Journal:
    """Notes each shard, and each quarter of a GiB of a large one; gone once the verification has come to its end.

    A line counts only for the same root, the same manifest and the same shard, byte for byte, and for a day. A cache
    that cannot be written is done without.

    Args:
        url: Of the run root.
        resume: Believe what an earlier one has noted; else begin anew.
        path: Of the journal; None: in ``$XDG_CACHE_HOME``.
    """

    def __init__(self, url: str, *, resume: bool, path: Path | None = None) -> None:
        self.path = path or _cache() / f"verify-{digest.digest(url.encode())}.jsonl"
        self._proven: dict[str, int] = _read(self.path) if resume else {}
        self._lock = threading.Lock()
        self._fd = -1

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            begin = 0 if self._proven else os.O_TRUNC
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | begin, 0o600)
        except OSError as err:
            logger.warning("%s cannot be written, so this cannot be resumed: %s", self.path, err.strerror)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if error is None:
                with contextlib.suppress(OSError):
                    self.path.unlink()

    def proven(self, manifest: Manifest, record: ShardRecord) -> int:
        """So many bytes of the shard, from its beginning, need not be read again."""
        return self._proven.get(_name(manifest, record), 0)

    def note(self, manifest: Manifest, record: ShardRecord, upto: int) -> None:
        """So many are proven now. Any thread."""
        if self._fd < 0 or (upto < record.body_nbytes and upto % _STEP_NBYTES):
            return
        line = json.dumps({"shard": _name(manifest, record), "upto": upto, "t": time.time()}) + "\n"
        with self._lock, contextlib.suppress(OSError):
            os.write(self._fd, line.encode())


def _name(manifest: Manifest, record: ShardRecord) -> str:
    return f"{digest.digest(manifest.dumps())}:{record.path}:{record.digest}"


def _cache() -> Path:
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if named.startswith("/") else Path.home() / ".cache") / "dcpsvc"


def _read(path: Path) -> dict[str, int]:
    """What is noted; a line that was cut short, or is none of ours, says nothing."""
    found: dict[str, int] = {}
    try:
        text = path.read_bytes()[:_MAX_NBYTES].decode(errors="replace")
    except OSError:
        return found
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            noted: dict[str, Any] = json.loads(line)
            name, upto, date_s = str(noted["shard"]), int(noted["upto"]), float(noted["t"])
            if 0 <= time.time() - date_s < BELIEVED_S:
                found[name] = max(upto, found.get(name, 0))
    return found
