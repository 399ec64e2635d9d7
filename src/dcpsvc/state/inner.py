"""Tensors made of others, as quantized weights are: what torch calls traceable wrapper subclasses.

The plain tensors inside are what is copied, watched and stored. The outer one is never made again: what it is, is
written down, and compared with the one that is there when a checkpoint is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dcpsvc.errors import UnsupportedStateError
from dcpsvc.format.digest import digest
from dcpsvc.format.parse import compact
from dcpsvc.state import meshes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.device_mesh import DeviceMesh

FIELDS = ("class", "inner", "dtype", "shape", "context", "sharding", "local")
"""Of a record, in the order in which they are compared."""

UNKNOWN: dict[str, Any] = {"class": "tensor made of others", "inner": {}, "dtype": "", "shape": []}

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
"""Types of which nothing more need be asked: neither sharded, nor made of others."""

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_MAX_NBYTES = 2000


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor, or what this rank holds of a DTensor, is made of others."""
    if type(tensor) in PLAIN:  # nearly all are, and there may be 100,000
        return False
    return _wraps(local_of(tensor))


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds: the very object, so that what is inside it is what training writes to."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def parts(key: str, tensor: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    """The tensors inside, by the names they are stored under. One that is a DTensor of wrappers is left whole.

    Of a DTensor each part is stored by itself, under the first rank that holds it: how what is inside is cut when the
    outer tensor is, only its class knows.

    Args:
        key: Of the outer tensor.
        tensor: Is a wrapper.
        rank: This one.
    """
    if isinstance(tensor, DTensor):
        first = meshes.alike(tensor.device_mesh, tensor.placements, rank)[0]
        return parts(f"{key}@{first}", local_of(tensor), rank)
    found: dict[str, torch.Tensor] = {}
    for name, inner in _inner(tensor):
        found |= parts(f"{key}.{name}", inner, rank) if _wraps(inner) else {f"{key}.{name}": inner}
    return found


def version(tensor: torch.Tensor) -> int:
    """A number that changes when training writes to a tensor, or to those inside it, as far as torch counts writes."""
    if not is_wrapper(tensor):
        return tensor._version  # noqa: SLF001 - torch's only counter
    return sum(id(one) + version(one) for _, one in _inner(local_of(tensor)))  # a new one inside is a change, too


def record(key: str, tensor: torch.Tensor) -> dict[str, Any]:
    """What a wrapper is beside the values inside it, as JSON: the same for two that were made alike.

    Devices are left out: they say where it is, and not what.

    Raises:
        UnsupportedStateError: It holds a tensor that it does not tell of.
    """
    local = local_of(tensor)
    found: dict[str, Any] = {
        "class": _named(type(local)),
        "inner": {name: record(f"{key}.{name}", one) if _wraps(one) else None for name, one in _inner(local)},
        "dtype": str(tensor.dtype),
        "shape": list(tensor.shape),
        "context": _bounded(_plain(key, cast("Any", local).__tensor_flatten__()[1])),
    }
    if isinstance(tensor, DTensor):
        placements = ", ".join(map(str, tensor.placements))
        found |= {"sharding": f"({placements}) {_described(tensor.device_mesh)}", "local": list(local.shape)}
    return found


def told(found: dict[str, Any]) -> str:
    """A record for people."""
    return f"{found['class']}({', '.join(found['inner'])}) {found['dtype']}{found['shape']}".replace("torch.", "")


def claim(found: dict[str, Any]) -> str:
    """What every rank must agree on: all of a record, but for what is of one part of a sharded tensor."""
    own = {"local", "context", "inner"} if "sharding" in found else set[str]()
    return f"{told(found)} {digest(compact({name: value for name, value in found.items() if name not in own}))[:12]}"


def _wraps(tensor: torch.Tensor) -> bool:
    if type(tensor) in PLAIN or isinstance(tensor, DTensor | AsyncCollectiveTensor):
        return False
    return is_traceable_wrapper_subclass(tensor)


def _inner(tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


@functools.lru_cache(maxsize=64)
def _described(mesh: DeviceMesh) -> str:
    return f"over {mesh.size()} ranks {list(mesh.shape)} {digest(compact(mesh.mesh.tolist()))[:8]}"


def _plain(key: str, value: Any) -> Any:
    """What a class keeps beside tensors, as JSON; of objects that are not plain what they say of themselves."""
    if isinstance(value, torch.Tensor):
        raise UnsupportedStateError(key, "its class keeps a tensor where __tensor_flatten__() names none")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        value = {"class": _named(type(value)), **fields}
    if isinstance(value, dict):
        return {str(name): _plain(key, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(key, item) for item in value]
    is_number = isinstance(value, float) and math.isfinite(value)
    return value if value is None or is_number or type(value) in {bool, int, str} else _said(value)


def _said(value: Any) -> str:
    if isinstance(value, torch.device):
        return "device"
    if isinstance(value, Enum):
        return f"{_named(type(value))}.{value.name}"
    return _named(value) if hasattr(value, "__qualname__") else _ADDRESS.sub("", repr(value))


def _bounded(value: Any) -> Any:
    data = compact(value)
    return value if len(data) <= _MAX_NBYTES else f"{len(data)} bytes {digest(data)}"


def _named(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
