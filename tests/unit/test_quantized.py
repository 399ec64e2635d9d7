"""R27 R31: quantized weights: their plain parts are stored as they are, wrappers of several tensors refused by key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import dcpsvc
from dcpsvc.errors import UnsupportedStateError
from tests.unit.one_process import bits, resume, save

if TYPE_CHECKING:
    from pathlib import Path


class Scaled(torch.Tensor):
    """Integers and their scale behind one tensor, as torchao has it."""

    def __new__(cls, numbers: torch.Tensor, scale: torch.Tensor) -> Any:
        make: Any = torch.Tensor
        found = make._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)
        found.numbers, found.scale = numbers, scale
        return found

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, _context: Any, _size: Any, _stride: Any) -> Any:
        return cls(inner["numbers"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def scaled() -> Any:
    return Scaled(torch.arange(6, dtype=torch.int8).view(2, 3), torch.tensor(0.5))


def holding(**buffers: torch.Tensor) -> nn.Module:
    module = nn.Linear(2, 2)
    for name, tensor in buffers.items():
        module.register_buffer(name, tensor)
    return module


def test_integers_with_scales_and_zero_points_come_back_bit_for_bit(tmp_path: Path) -> None:
    parts = {
        "numbers": torch.arange(-3, 3, dtype=torch.int8),
        "scale": torch.rand(6),
        "zero": torch.ones(6).to(torch.uint8),
    }
    save(tmp_path, {"model": holding(**parts)})
    fresh = holding(**{name: torch.zeros_like(tensor) for name, tensor in parts.items()})
    resume(tmp_path, {"model": fresh})
    assert {name: bits(fresh.get_buffer(name)) for name in parts} == {name: bits(t) for name, t in parts.items()}


def test_a_wrapper_of_several_tensors_is_refused_by_key_with_what_it_is_made_of(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedStateError, match=r"model\.weights: a Scaled .*\(numbers, scale\).* register them"):
        save(tmp_path, {"model": holding(weights=scaled())})
    assert dcpsvc.list_checkpoints(tmp_path / "root") == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.ao has had its day
def test_a_quantized_tensor_of_torch_ao_is_refused_by_key_with_the_remedy(tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.qint8)
    with pytest.raises(UnsupportedStateError, match=r"model\.weights: .*int_repr\(\), scale and zero point"):
        save(tmp_path, {"model": holding(weights=quantized)})
    assert dcpsvc.list_checkpoints(tmp_path / "root") == []


def test_a_frozen_base_of_such_wrappers_has_a_fingerprint_of_what_it_is_made_of() -> None:
    from dcpsvc.state import fingerprint

    one, other = scaled(), scaled()
    other.scale = other.scale * 2
    found = [fingerprint.sums([("weights", tensor)], 0, None) for tensor in (one, scaled(), other)]
    assert found[0] == found[1] != found[2]
