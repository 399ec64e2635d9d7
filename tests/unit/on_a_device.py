"""Tensors of which the host cannot write the memory: bytes get there by ``copy_``, and by nothing else."""

from __future__ import annotations

from typing import Any, Self

import torch

_aten = torch.ops.aten
_VIEWS = {_aten.detach.default, _aten.slice.Tensor, _aten.view.default, _aten.alias.default}


class OnADevice(torch.Tensor):
    """Says that it is on ``lazy``: a device that every torch knows, and nothing here uses.

    Attributes:
        held: What it holds.
        copies: Bytes of each copy that came, in order; views have those of the whole.
    """

    held: torch.Tensor
    copies: list[int]

    @staticmethod
    def __new__(cls, held: torch.Tensor, copies: list[int] | None = None) -> Self:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device="lazy"
        )

    def __init__(self, held: torch.Tensor, copies: list[int] | None = None) -> None:
        self.held, self.copies = held, [] if copies is None else copies

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        here, *rest = args
        if func is _aten.copy_.default:
            (source,) = rest
            assert source.device.type == "cpu"
            here.held.copy_(source)
            here.copies.append(source.nbytes)
            return here
        assert func in _VIEWS, f"{func} would bring bytes to a device"
        return cls(func(here.held, *rest, **kwargs or {}), here.copies)
