"""Tensors and plain values of the state: they come back bit for bit, or are refused by key."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dcpsvc import Checkpointer, PerRank, list_checkpoints
from dcpsvc.errors import RestoreFailedError, SaveFailedError, StateError, UnsupportedStateError
from tests.unit.one_process import bits, resume, save

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.complex128,
]  # fmt: skip
HUGE = torch.arange(1 << 20, dtype=torch.float32)
BASE = torch.arange(24, dtype=torch.float32).view(2, 3, 4)


@pytest.mark.parametrize(
    "value",
    [torch.tensor([[0, 1], [1, 0]]).to(dtype) for dtype in DTYPES]
    + [torch.tensor(1.5), torch.ones((), dtype=torch.bool), torch.empty(0), torch.empty(2, 0, 3)]
    + [BASE.permute(2, 0, 1), BASE[:, ::2, 1], BASE[0, 0, 0].expand(5), HUGE[7:10], HUGE[::500_000]]
    + [torch.tensor([float("nan"), -0.0, float("inf")])],
    ids=lambda value: f"{value.dtype}{list(value.shape)}{list(value.stride())}",
)  # fmt: skip
def test_a_tensor_of_any_kind_comes_back_bit_for_bit(tmp_path: Path, value: torch.Tensor) -> None:
    save(tmp_path, {"x": value, "in": {"a": [value]}})
    state: dict[str, Any] = {"x": torch.zeros(value.shape, dtype=value.dtype), "in": {}}
    resume(tmp_path, state)
    for loaded in (state["x"], state["in"]["a"][0]):
        assert (loaded.dtype, loaded.shape) == (value.dtype, value.shape)
        assert bits(loaded) == bits(value)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", [torch.complex32, torch.float4_e2m1fn_x2], ids=str)
def test_a_dtype_without_a_name_is_refused_by_key_and_nothing_is_published(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"x": {"a": [torch.empty(2, dtype=dtype)]}}
    with (
        pytest.raises(SaveFailedError, match=r"x\.a\.0"),
        Checkpointer(tmp_path / "root", state, local=tmp_path / "local") as ckpt,
        pytest.raises(UnsupportedStateError, match=rf"x\.a\.0: dtype {dtype} has no name in a layout; cast it"),
    ):
        ckpt.save(1)
    assert not list_checkpoints(tmp_path / "root")


def test_a_view_of_a_huge_tensor_stores_only_the_view(tmp_path: Path) -> None:
    save(tmp_path, {"x": HUGE[7:10]})
    (path,) = (tmp_path / "root" / "data").glob("*/*.safetensors")
    assert path.stat().st_size < 20_000


def test_a_tensor_is_loaded_in_place(tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.ones(3)})
    fresh = torch.zeros(3)
    resume(tmp_path, {"x": fresh})
    assert torch.equal(fresh, torch.ones(3))


@pytest.mark.parametrize(
    ("fresh", "reason"),
    [
        (torch.zeros(4), r"shape +float32\[3\] +float32\[4\]"),
        (torch.zeros(3).double(), r"dtype +float32\[3\] +float64\[3\]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tmp_path: Path, fresh: torch.Tensor, reason: str) -> None:
    save(tmp_path, {"x": torch.ones(3)})
    with pytest.raises(RestoreFailedError, match=f"x +{reason}"):
        resume(tmp_path, {"x": fresh})
    assert not fresh.any()


@pytest.mark.parametrize(
    "value",
    [7, 2.5, True, None, "text", (1, [2, {"a": b"\0"}]), Counter(a=1), {1: {2: 3}}, np.float32(1.5), [np.arange(3)]],
)
def test_a_plain_value_comes_back_into_the_mapping(tmp_path: Path, value: Any) -> None:
    save(tmp_path, {"v": value, "own": PerRank(value)})
    state: dict[str, Any] = {"v": {} if isinstance(value, dict) else None, "own": PerRank(None)}
    resume(tmp_path, state)
    for loaded in (state["v"], state["own"].value):
        np.testing.assert_equal(loaded, value)


def test_a_dict_is_loaded_in_place(tmp_path: Path) -> None:
    save(tmp_path, {"v": OrderedDict(b=1, a=[torch.ones(2)])})
    fresh = {"old": 1}
    resume(tmp_path, {"v": fresh})
    assert list(fresh) == ["b", "a"]
    assert torch.equal(fresh["a"][0], torch.ones(2))


def test_what_cannot_be_saved_is_named_and_the_step_is_no_checkpoint(tmp_path: Path) -> None:
    state = {"loader": {"dataset": {"transform": print}}}
    with (
        pytest.raises(SaveFailedError, match=r"loader\.dataset\.transform"),
        Checkpointer(tmp_path / "root", state, local=tmp_path / "local") as ckpt,
        pytest.raises(UnsupportedStateError, match=r"^loader\.dataset\.transform: builtins"),
    ):
        ckpt.save(1)
    assert list_checkpoints(tmp_path / "root") == []


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (torch.eye(2).to_sparse(), "x"),
        (torch.empty(2, device="meta"), "x"),
        (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta")), "x.1.weight"),
    ],
)
def test_a_tensor_that_cannot_be_stored_is_refused_by_key(tmp_path: Path, value: object, key: str) -> None:
    with (
        pytest.raises(SaveFailedError, match=key),
        Checkpointer(tmp_path / "root", {"x": value}, local=tmp_path / "local") as ckpt,
        pytest.raises(StateError, match=f"^{key}: "),
    ):
        ckpt.save(1)


def test_documents_are_json_in_the_shard(tmp_path: Path) -> None:
    save(tmp_path, {"sched": {"last_epoch": 7}})
    (path,) = (tmp_path / "root" / "data").glob("*/*.safetensors")
    with safe_open(path, framework="pt") as file:
        assert json.loads(bytes(file.get_tensor("__dcpsvc__.objects").numpy())) == {"sched": {"last_epoch": 7}}
