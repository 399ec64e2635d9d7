"""Floating-point tensors as bytes, in another precision. As torch rounds them: to the nearest, ties to even."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLOATS = ("F64", "F32", "F16", "BF16")
"""What can be cast; everything else stays as it is."""

_KINDS: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def cast(data: NDArray[np.uint8], source: str, wanted: str) -> NDArray[np.uint8]:
    """The same numbers in another dtype, flat bytes to flat bytes; what is no float is returned as it is."""
    if source == wanted or source not in FLOATS:
        return data
    if source == "BF16":
        values = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = data.view(_KINDS[source])
    with np.errstate(over="ignore"):
        found = _to_bf16(values.astype(np.float32)) if wanted == "BF16" else values.astype(_KINDS[wanted])
    return found.view(np.uint8)


def result(source: str, wanted: str | None) -> str:
    """What becomes of a dtype."""
    return wanted if wanted is not None and source in FLOATS else source


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded
