"""A Checkpointer in one process: save a state, resume into another, and compare bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dcpsvc import Checkpointer

if TYPE_CHECKING:
    from pathlib import Path


def save(folder: Path, state: dict[str, Any], step: int = 1) -> None:
    with Checkpointer(folder / "root", state, local=folder / "local") as ckpt:
        ckpt.save(step).wait(30)


def resume(folder: Path, state: dict[str, Any], **options: Any) -> int:
    with Checkpointer(folder / "root", state, local=folder / "local", save_last=False) as ckpt:
        return ckpt.resume(**options)


def told(value: Any) -> Any:
    """A value in full, so that two compare bit for bit and type for type."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), list(value.shape), str(value.device), bits(value)
    if isinstance(value, dict):
        return {name: told(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value).__name__, [told(item) for item in value]
    return type(value).__name__, repr(value)


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, row major."""
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
