"""Calls of every command that takes a run root, for a run on a real S3 server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.s3.servers import Server


def options_of(server: Server) -> list[str]:
    told = (
        (key, value if isinstance(value, str) else json.dumps(value)) for key, value in server.storage_options.items()
    )
    return [part for key, value in told for part in ("--option", f"{key}={value}")]


ARGUMENTS: dict[str, tuple[object, ...]] = {
    "ls": ("ROOT",),
    "show": ("ROOT", 1, "--filter", "weight"),
    "diff": ("ROOT", 1, 2, "--values"),
    "du": ("ROOT",),
    "verify": ("ROOT", "--jobs", 2),
    "report": ("ROOT", "--output", "FILE"),
    "doctor": ("ROOT", "--local", "DIR", "--size", "1MiB"),
    "pin": ("ROOT", 1, "--note", "paper"),
    "unpin": ("ROOT", 1),
    "edit": ("ROOT", 2, "--set", "optim.lr=0.25"),
    "promote": ("ROOT", 1, "ELSEWHERE"),
    "gc": ("ROOT", "--keep", "latest:1", "--local", "DIR"),
    "status": ("ROOT",),
    "save": ("ROOT",),
    "stop": ("ROOT",),
    "fetch": ("ROOT", 1, "DIR"),
    "cp": ("ROOT", "ELSEWHERE"),
    "export": ("ROOT", "latest", "DIR", "--format", "hf"),
    "import": ("FOLDER", "ELSEWHERE", 7),
}
"""Of each command that takes a run root a call that works, but for :data:`CODES`."""
CODES = {"status": 4, "save": 4, "stop": 4}  # no job lives
