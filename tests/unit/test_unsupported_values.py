"""What is neither a tensor nor JSON-like is refused when it is saved, by its dotted key."""

from __future__ import annotations

import threading
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dcpsvc.errors import UnsupportedStateError
from dcpsvc.state import documents


def encode(value: Any, key: str = "v") -> Any:
    return documents.encode(value, key, {})


ITSELF: list[Any] = []
ITSELF.append(ITSELF)


@pytest.mark.parametrize(
    "value",
    [
        object(), lambda: None, {1, 2}, frozenset(), 1j, ITSELF, nn.Linear(1, 1), np.array([None]), np.array(["a"]),
        np.array([1j]), np.array(["2026-01-01"], "M8[D]"), np.array([1], ">i4"), np.array([(1,)], [("a", "i4")]),
        Decimal(1),
        PurePosixPath("x"), range(3), bytearray(b"x"), int, threading.Lock(), iter([]), ValueError("x"), torch.float32,
        torch.Generator(), {b"key": 1}, {frozenset(): 1}, {1j: 1},
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_neither_tensor_nor_json_like_is_refused_by_its_dotted_key(value: Any) -> None:
    with pytest.raises(UnsupportedStateError) as caught:
        encode({"a": [0, {"b": value}]}, "loader")
    assert caught.value.key.startswith("loader.a.1.b")


def test_a_refused_object_is_named_by_its_type_and_the_way_out_is_told() -> None:
    with pytest.raises(UnsupportedStateError, match=r"^v.f: builtins.function is neither a tensor .*state_dict\(\)"):
        encode({"f": lambda: None})


def test_a_value_nested_too_deep_is_refused() -> None:
    value: Any = 0
    for _ in range(300):
        value = [value]
    with pytest.raises(UnsupportedStateError, match="nested deeper than 200 levels"):
        encode(value)
