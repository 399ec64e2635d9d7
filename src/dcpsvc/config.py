"""The options of a Checkpointer, as one frozen value that is checked when it is made."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dcpsvc.errors import ConfigError
from dcpsvc.policies import Every, Everything, Keep, is_count, is_number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dcpsvc.events import Event

LOCAL_VARIABLE = "DCPSVC_LOCAL"
"""Environment variable that names the local tier where ``local=`` does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything about a Checkpointer except the run root and the state."""

    local: str | os.PathLike[str] | None = None
    """This node's fast tier. Default: ``$DCPSVC_LOCAL``, else a directory of this user under the system's
    temporary directory. All ranks of a node share it."""

    every: Every | None = None
    """When ``step()`` saves. None: only ``save()``, and the last step at the end."""

    keep: Keep = field(default_factory=Everything)
    """What retention keeps; the rest is deleted. Default: everything is kept."""

    keep_local: int = 2
    """How many of the newest checkpoints each rank leaves on its local tier, for a fast restart. At least 1."""

    storage_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Passed to fsspec: credentials, endpoint. Never logged, never written."""

    sync_timeout_s: float = 60.0
    """Longest wait for a peer that should arrive: to save, to commit, to resume, to close."""

    upload_timeout_s: float = 1800.0
    """Longest time a shard may take to reach the local disk, and again to reach the run root. A rank that
    stops giving signs of life is noticed after ``sync_timeout_s`` all the same."""

    max_consecutive_failures: int = 3
    """Failed saves in a row that training survives; the next ``step()`` raises the last one."""

    on_failure: Literal["continue", "raise"] = "continue"
    """``raise``: the first failed save is raised by the next ``step()``."""

    save_last: bool = True
    """Save the last step when the Checkpointer closes, if it is not saved yet."""

    on_event: Callable[[Event], None] | None = None
    """Called with every life-cycle event of this rank, on whichever thread it happens. Must not block."""

    def __post_init__(self) -> None:
        _positive("sync_timeout_s", self.sync_timeout_s)
        _positive("upload_timeout_s", self.upload_timeout_s)
        if not is_count(self.max_consecutive_failures):
            raise ConfigError(
                f"max_consecutive_failures={self.max_consecutive_failures!r} must be an int of at least 1"
            )
        if not is_count(self.keep_local):
            raise ConfigError(f"keep_local={self.keep_local!r} must be an int of at least 1")
        if self.on_failure not in ("continue", "raise"):
            raise ConfigError(f"on_failure={self.on_failure!r} must be 'continue' or 'raise'")
        _instance("every", self.every, (Every, type(None)), "an Every(...), or None")
        _instance("keep", self.keep, Keep, "a policy such as Latest(3)")

    @property
    def local_dir(self) -> Path:
        """Where the local tier is."""
        if self.local is not None:
            return Path(self.local).absolute()
        if named := os.environ.get(LOCAL_VARIABLE):
            return Path(named).absolute()
        return Path(tempfile.gettempdir()) / f"dcpsvc-{os.getuid()}"

    @property
    def failure_budget(self) -> int:
        """Failed saves in a row before ``step()`` raises."""
        return 1 if self.on_failure == "raise" else self.max_consecutive_failures


def _positive(name: str, value: float) -> None:
    if not is_number(value) or not 0 < value < math.inf:
        raise ConfigError(f"{name}={value!r} must be a number of seconds above 0")


def _instance(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={value!r} must be {wanted}")
