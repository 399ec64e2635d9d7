"""Metrics in JSON, which has no NaN and no infinity: those are strings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcpsvc.format.parse import Fields

_MAX_INT = 2**63


def dump(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """For a file."""
    return {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}


def load(fields: Fields) -> dict[str, float]:
    """As they were; raises the fields' own error for what is no number."""
    return {name: _number(fields, name, value) for name, value in fields.items()}


def _number(fields: Fields, name: str, value: Any) -> float:
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MAX_INT):
        return float(value)
    if isinstance(value, str) and value in {"nan", "inf", "-inf"}:
        return float(value)
    raise fields.fail(f"metric {name!r} is not a number")
