"""Values as JSON documents: what goes in comes out, what cannot is refused by key, and reading executes nothing."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dcpsvc.errors import StateError, StateMismatchError
from dcpsvc.format.parse import compact
from dcpsvc.state import documents

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.text(max_size=6)
    | st.binary(max_size=6)
    | st.lists(st.integers(0, 9), max_size=3).map(torch.Size)
)
hashable = (
    st.text(max_size=4) | st.integers() | st.floats() | st.booleans() | st.none() | st.tuples(st.integers(), st.text())
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("abc$", max_size=4), inner, max_size=3)
        | st.dictionaries(hashable, inner, max_size=3)
        | st.dictionaries(hashable, st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=10,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["$tuple", "$dict", "$counter", "$bytes", "$size", "$float", "$tensor", "$ndarray", "$x", "a"]
            ),
            inner,
            max_size=2,
        )
    ),
    max_leaves=8,
)
TENSORS = {"t": torch.arange(3)}


def round_trip(value: Any) -> Any:
    """Through the very bytes a shard holds."""
    tensors: dict[str, torch.Tensor] = {}
    data = compact(documents.encode(value, "v", tensors))
    assert sorted(documents.tensor_names(json.loads(data))) == sorted(tensors)
    return documents.decode(json.loads(data), "v", tensors.__getitem__)


def told(value: Any) -> Any:
    """The value with all types spelled out, so that nan is nan, and 1 is not True."""
    kind = type(value).__name__
    if isinstance(value, dict):
        return kind, [(told(name), told(item)) for name, item in value.items()]
    if isinstance(value, list | tuple):
        return kind, [told(item) for item in value]
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return kind, str(value.dtype), tuple(value.shape), value.tolist()
    return kind, repr(value)


def encode(value: Any, key: str = "v") -> Any:
    return documents.encode(value, key, {})


@given(values)
def test_a_value_comes_back_as_it_was_with_its_types(value: Any) -> None:
    assert told(round_trip(value)) == told(value)


@pytest.mark.parametrize(
    "value",
    [
        0.0, -0.0, math.nan, math.inf, -math.inf, 5e-324, 1.7976931348623157e308, 2**64, -(2**4000), True, None, "",
        "\ud800\0",
        b"", b"\0\xff", (), (1,), [[]], {}, {"": {}}, ((), ([], {})), torch.Size([]), torch.Size([2, 3]),
        {1: "int", "1": "str"}, {None: 0, (1, ("a",)): 1, 2.5: 2, math.inf: 3}, {True: "t"}, Counter({3: 2, "a": 1}),
        Counter(),
        {"$tensor": "x"}, {"$tuple": [1]}, {"$": 1, "a": 2}, {"a": {"$dict": []}}, {"$unknown": None},
        [{"$bytes": "!"}],
    ],
    ids=repr,
)  # fmt: skip
def test_a_value_at_the_edge_comes_back_as_it_was(value: Any) -> None:
    assert told(round_trip(value)) == told(value)


@pytest.mark.parametrize("value", [OrderedDict(b=1, a=2), defaultdict(list, b=[1], a=[2])])
def test_other_kinds_of_dict_come_back_as_a_plain_dict_in_their_order(value: dict[str, Any]) -> None:
    assert told(round_trip(value)) == told(dict(value))


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"])
def test_numpy_arrays_and_scalars_come_back_with_their_dtype(dtype: str) -> None:
    for value in (np.array([[0, 1, 1]], dtype), np.array(1, dtype), np.array([], dtype), np.array([1], dtype)[0]):
        assert told(round_trip(value)) == told(value)


def test_a_strided_array_and_a_fortran_array_come_back_by_value() -> None:
    for value in (np.arange(12)[::-3], np.asfortranarray(np.arange(6).reshape(2, 3))):
        assert told(round_trip(value)) == told(value)


def test_tensors_are_named_by_where_they_stand() -> None:
    tensors: dict[str, torch.Tensor] = {}
    value = {"a": [torch.ones(1), (torch.zeros(2),)], 5: torch.ones(3), "p": nn.Parameter(torch.ones(4))}
    document = documents.encode(value, "v", tensors)
    assert {name: tensor.numel() for name, tensor in tensors.items()} == {"v.a.0": 1, "v.a.1.0": 2, "v.5": 3, "v.p": 4}
    assert not any(tensor.requires_grad for tensor in tensors.values())
    assert set(documents.tensor_names(document)) == set(tensors)


def test_tensors_are_taken_by_reference() -> None:
    tensors: dict[str, torch.Tensor] = {}
    value = torch.ones(3)
    documents.encode({"a": value}, "v", tensors)
    assert tensors["v.a"].data_ptr() == value.data_ptr()


@pytest.mark.parametrize("value", [{"a.b": 1, "a": {"b": 2}}, {1: 1, "1": 2}])
def test_two_tensors_of_one_name_are_refused(value: dict[Any, Any]) -> None:
    def tensors(item: Any) -> Any:
        return {k: tensors(v) for k, v in item.items()} if isinstance(item, dict) else torch.ones(item)

    with pytest.raises(StateError, match=r"v\.(a\.b|1): two tensors of the state would have this name"):
        encode(tensors(value))


def types_of(value: Any) -> set[type]:
    below = (
        [*value.keys(), *value.values()]
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else []
    )
    return {type(value)}.union(*map(types_of, below))


@given(json_values)
def test_reading_any_document_gives_only_the_documented_types(document: Any) -> None:
    documented = {
        type(None), bool, int, float, str, bytes, list, tuple, dict, Counter, torch.Size, torch.Tensor, np.ndarray,
        np.int64,
    }  # fmt: skip
    try:
        value = documents.decode(document, "v", TENSORS.__getitem__)
    except (StateError, KeyError, TypeError, ValueError):
        return
    assert types_of(value) <= documented


@pytest.mark.parametrize("tag", ["$object", "$pickle", "$call", "$", "$Tensor", "$dict "])
def test_a_tag_that_is_not_ours_is_refused(tag: str) -> None:
    with pytest.raises(StateMismatchError, match="value of unknown kind"):
        documents.decode({"a": [{tag: ["os.system", "true"]}]}, "v", TENSORS.__getitem__)


def test_leaves_are_told_by_dotted_path() -> None:
    value = {"a": {"b": 1, "c": [1, 2]}, "d": (1,), "e": {1: 2}}
    assert documents.leaves(encode(value), "v") == {
        "v.a.b": 1,
        "v.a.c": [1, 2],
        "v.d": {"$tuple": [1]},
        "v.e": {"$dict": [[1, 2]]},
    }


def test_tensors_may_be_left_out_of_the_leaves_by_name() -> None:
    value = {"a": {"b": torch.ones(1), "c": 1}, "d": [torch.ones(1)], "e": torch.ones(1)}
    assert documents.leaves(encode(value), "v", but={"v.a.b", "v.c"}) == {
        "v.a.c": 1,
        "v.d": [{"$tensor": "v.d.0"}],
        "v.e": {"$tensor": "v.e"},
    }


def test_equal_values_give_equal_bytes() -> None:
    assert compact(encode({"a": [1.5, (None, b"x")]})) == compact(encode({"a": [1.5, (None, b"x")]}))
