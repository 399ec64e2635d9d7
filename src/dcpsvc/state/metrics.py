"""Metric objects of torchmetrics: modules by type, and accumulators by nature."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import UnsupportedStateError

if TYPE_CHECKING:
    from torch import nn


def has_metrics(module: nn.Module) -> bool:
    """Whether a module is a metric, or a collection of some."""
    return bool(_metrics(module)) and not any(True for _ in module.parameters())


def check_kept(name: str, module: nn.Module) -> None:
    """Refuse metrics that keep their state out of ``state_dict()``, as all do unless told otherwise.

    Raises:
        UnsupportedStateError: One does, so nothing of it would be saved.
    """
    for metric in _metrics(module):
        if lost := [state for state, kept in metric._persistent.items() if not kept]:  # noqa: SLF001 - no other way to ask
            reason = f"a metric whose state_dict() leaves out {', '.join(lost)}; call its persistent(True) first"
            raise UnsupportedStateError(name, reason)


def _metrics(module: nn.Module) -> list[Any]:
    kind = getattr(sys.modules.get("torchmetrics"), "Metric", None)
    return [] if kind is None else [child for child in module.modules() if isinstance(child, kind)]
