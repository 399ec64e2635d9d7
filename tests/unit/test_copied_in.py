"""What was read is copied into the memory of the state: alike whatever the size, and it counts as a change."""

from __future__ import annotations

import pytest
import torch

from dcpsvc.state.saved import copy_into

SIZES = [(3, 5), (600, 700)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("loaded_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
def test_a_parameter_holds_what_was_loaded_where_it_was_and_its_version_tells(
    sizes: tuple[int, int],
    loaded_dtype: torch.dtype,
    turned: bool,  # noqa: FBT001
) -> None:
    made = torch.zeros(sizes[::-1]).t() if turned else torch.zeros(sizes)
    parameter = torch.nn.Parameter(made)
    loaded = torch.rand(sizes, dtype=loaded_dtype)
    place, version = parameter.data_ptr(), parameter._version
    copy_into(parameter, loaded)
    assert torch.equal(parameter, loaded.to(torch.float32))
    assert parameter.data_ptr() == place
    assert parameter._version > version


def test_what_is_in_its_place_already_is_left() -> None:
    parameter = torch.nn.Parameter(torch.rand(600, 700))
    version = parameter._version
    copy_into(parameter, parameter.detach())
    assert parameter._version == version
