"""The two places a run lives in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from dcpsvc.storage.base import Store


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
