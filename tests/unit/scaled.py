"""Tensors made of others as torchao has them, and an optimizer that keeps its state in such."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

ROWS, COLUMNS = 6, 4
_ALIKE = {torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.view.default}


class Scaled(torch.Tensor):
    """Integers, and a scale for each row, behind one tensor of floats.

    Attributes:
        numbers: int8.
        scale: Of each row.
        note: Whatever goes with them.
    """

    numbers: torch.Tensor
    scale: torch.Tensor
    note: Any

    def __new__(cls, numbers: torch.Tensor, scale: torch.Tensor, note: Any = None) -> Any:
        make: Any = torch.Tensor
        found = make._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype, device=numbers.device)
        found.numbers, found.scale, found.note = numbers, scale, note
        return found

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["numbers", "scale"], {"note": self.note}

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, _size: Any, _stride: Any) -> Any:
        return cls(inner["numbers"], inner["scale"], context["note"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ALIKE:  # of the same shape
            return cls(func(args[0].numbers, *args[1:], **(kwargs or {})), args[0].scale, args[0].note)
        raise NotImplementedError(func)

    def value(self) -> torch.Tensor:
        return self.numbers * self.scale[:, None]

    def take(self, value: torch.Tensor) -> None:
        """In place, rounded."""
        self.scale.copy_(value.abs().amax(1) / 127 + 1e-8)
        self.numbers.copy_((value / self.scale[:, None]).round())


def scaled(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS, note: Any = "rows", kind: Any = Scaled) -> Any:
    generator = torch.Generator().manual_seed(seed)
    found = kind(torch.zeros(rows, columns, dtype=torch.int8), torch.zeros(rows), note)
    found.take(torch.randn(rows, columns, generator=generator))
    return found


def inside(tensor: Any) -> dict[str, list[float]]:
    """What a wrapper has in it, in full; of a DTensor what is here."""
    local = here(tensor)
    return {name: getattr(local, name).tolist() for name in local.__tensor_flatten__()[0]}


class Layer(nn.Module):
    """A weight of such a kind and a bias."""

    def __init__(self, weight: Any, *, rows: int = ROWS) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(rows))


class Coarse(torch.optim.Optimizer):
    """Keeps the mean of gradients in eight bits, from its first step on."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})
        self.note = "of an optimizer"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in (each for each in group["params"] if each.grad is not None):
                local, state = here(parameter), self.state[parameter]
                if not state:
                    state["step"], state["mean"] = torch.tensor(0.0), self._zeros(parameter)
                state["step"] += 1
                mean = here(state["mean"])
                mean.take(0.9 * mean.value() + here(parameter.grad) + 1e-4 * torch.randn(local.shape))
                local.sub_(group["lr"] * mean.value())

    def _zeros(self, parameter: torch.Tensor) -> torch.Tensor:
        local = here(parameter)
        made: Any = Scaled(torch.zeros(local.shape, dtype=torch.int8), torch.zeros(len(local)), self.note)
        if not isinstance(parameter, DTensor):
            return made
        place: Any = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
        return DTensor.from_local(made, parameter.device_mesh, parameter.placements, **place)


def here(tensor: torch.Tensor) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
