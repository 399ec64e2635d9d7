"""torch dtypes and their names in a layout: those of safetensors, and some in its manner that it lacks."""

from __future__ import annotations

import torch

from dcpsvc.errors import UnsupportedStateError

_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.uint16: "U16",
    torch.int32: "I32", torch.uint32: "U32", torch.int64: "I64", torch.uint64: "U64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3", torch.complex64: "C64",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex128: "C128",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def name_of(dtype: torch.dtype, key: str) -> str:
    """The name of a dtype; refused by key where there is none."""
    if dtype not in _NAMES:
        raise UnsupportedStateError(key, f"dtype {dtype} has no name in a layout; cast it")
    return _NAMES[dtype]


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype for a name that a layout has validated."""
    return _DTYPES[name]
