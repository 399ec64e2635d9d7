"""The two places a run lives in. A copied run root has the identity of the first: a note says whose a local tier is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc.storage import posixfile

if TYPE_CHECKING:
    from pathlib import Path

    from dcpsvc.storage.base import Store


_NOTE = "run-root"
_MAX_NBYTES = 4096


def note_root(local_path: Path, url: str) -> None:
    """A job of the run root at ``url`` keeps its checkpoints here from now on."""
    if noted_root(local_path) != url:
        descriptor, temp = posixfile.open_temp(local_path)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - it is open already
            file.write(url.encode())
        temp.replace(local_path / _NOTE)


def noted_root(local_path: Path) -> str:
    """Of which run root the last job here was; empty if nothing says so."""
    try:
        with (local_path / _NOTE).open("rb") as file:
            return file.read(_MAX_NBYTES).decode(errors="replace")
    except OSError:
        return ""


@dataclass(slots=True, kw_only=True)
class Tiers:
    """Where one rank's job keeps checkpoints.

    Attributes:
        run_id: Identity of the run root.
        remote: The run root.
        local: This node's tier for this run, with the layout of the run root.
        local_path: Where that is.
    """

    run_id: str
    remote: Store
    local: Store
    local_path: Path
