"""R34: the fingerprint of a base sees every bit and every place, and adds up over any parts."""

from __future__ import annotations

import pytest
import torch

from dcpsvc.state import fingerprint
from dcpsvc.state.ragged import Holders, Ragged

DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.uint8,
    torch.int64, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


def counted(*tensors: torch.Tensor, rank: int = 0) -> int:
    found = fingerprint.sums([(f"t{number}", tensor) for number, tensor in enumerate(tensors)], rank, None)
    assert found is not None
    return found.counted


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_element_that_changes_or_two_that_change_places_are_seen(dtype: torch.dtype) -> None:
    tensor = (torch.arange(24).view(4, 6) % 2).to(dtype)
    tensor[3, 4] = 1
    swapped, changed = tensor.clone(), tensor.clone()
    swapped[0, 0], swapped[3, 4] = tensor[3, 4], tensor[0, 0]
    changed[2, 5] = 0
    assert len({counted(tensor), counted(swapped), counted(changed)}) == 3
    assert counted(tensor.t()) == counted(tensor.t().contiguous())


def test_tensors_that_change_places_are_seen() -> None:
    a, b = numbers(3, 4), numbers(3, 4) + 1
    assert counted(a, b) != counted(b, a)


def test_what_has_no_elements_or_no_dimensions_counts_as_it_is() -> None:
    assert counted(torch.empty(0, 3)) == 0
    assert counted(torch.tensor(1.0)) != counted(torch.tensor(2.0)) != 0


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 5)])
def test_parts_of_a_flat_tensor_add_up_wherever_it_is_cut(shape: tuple[int, ...]) -> None:
    whole = numbers(*shape)
    for cut in range(whole.numel() + 1):
        parts = whole.flatten()[:cut].clone(), whole.flatten()[cut:].clone()
        alone = Holders((0,))
        found = [counted(Ragged(part, shape, at, part, alone)) for part, at in zip(parts, (0, cut), strict=True)]
        assert sum(found) % 2**64 == counted(whole)


@pytest.mark.parametrize("shape", [(41,), (7, 3), (1, 40), (2, 3, 11)])
def test_read_in_pieces_it_is_the_same(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = numbers(*shape)
    whole = counted(tensor)
    monkeypatch.setattr(fingerprint, "_AT_ONCE", 8)
    assert counted(tensor) == whole


def test_without_values_there_is_none() -> None:
    assert fingerprint.sums([("t", torch.empty(3, device="meta"))], 0, None) is None
