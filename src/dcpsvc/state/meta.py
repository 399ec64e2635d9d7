"""Modules built on the meta device: they have shapes and no memory, so what was read becomes their memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dcpsvc.errors import StateMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterable


def assign(module: nn.Module, here: torch.Tensor, loaded: torch.Tensor) -> None:
    """Put what was read in the place of a parameter or buffer on the meta device, under all names it has.

    A DTensor goes to the device of its mesh, all else to the host.
    """
    found = _made(here, loaded)
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter is here:
                setattr(owner, name, found)
        for name, buffer in list(owner.named_buffers(recurse=False, remove_duplicate=False)):
            if buffer is here:
                setattr(owner, name, found)


def refuse(optimizer: str, parameters: Iterable[torch.Tensor]) -> None:
    """An optimizer keeps the parameters it was made with, which would stay on the meta device.

    Raises:
        StateMismatchError: One of them is there.
    """
    if any(parameter.device.type == "meta" for parameter in parameters):
        raise StateMismatchError(
            optimizer,
            "its parameters are on the meta device; call to_empty(device=...) on the module before, or load the "
            "module without it and make the optimizer then",
        )


def _made(here: torch.Tensor, loaded: torch.Tensor) -> torch.Tensor:
    found = loaded.to(here.dtype)
    if isinstance(here, DTensor):
        found = DTensor.from_local(
            found.to(here.device_mesh.device_type), here.device_mesh, here.placements, run_check=False,
            shape=here.size(), stride=here.stride(),
        )  # fmt: skip
    return nn.Parameter(found, requires_grad=here.requires_grad) if isinstance(here, nn.Parameter) else found
