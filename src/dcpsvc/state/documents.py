"""Values as JSON documents. Tensors are taken out and named; what is neither JSON-like nor tensor is refused.

Reading a document executes nothing: the tags below are the only types it can make.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dcpsvc.errors import StateError, StateMismatchError, UnsupportedStateError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PLAIN = (str, int, bool, type(None))
_MAX_DEPTH = 200


def encode(value: Any, key: str, tensors: dict[str, torch.Tensor], _depth: int = 0) -> Any:
    """The JSON document for ``value``; its tensors are added to ``tensors`` under dotted names.

    Args:
        value: None, bool, int, float, str, bytes, list, tuple, dict (also OrderedDict, Counter), tensors,
            NumPy arrays and scalars, in any nesting.
        key: Where the value stands; prefix of every name.
        tensors: Receives the tensors themselves, not copies.

    Raises:
        UnsupportedStateError: Something else, named by its key.
        StateError: Two tensors would get one name.
    """
    if _depth > _MAX_DEPTH:
        raise UnsupportedStateError(key, f"nested deeper than {_MAX_DEPTH} levels, or contains itself")
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        return {"$tensor": _add(key, value.detach(), tensors)}
    if encoder := _ENCODERS.get(kind):
        return encoder(value)
    if isinstance(value, np.ndarray | np.generic):
        return _encode_numpy(value, key, tensors)
    if kind is list:
        return [encode(item, f"{key}.{i}", tensors, _depth + 1) for i, item in enumerate(value)]
    if kind is tuple:
        return {"$tuple": [encode(item, f"{key}.{i}", tensors, _depth + 1) for i, item in enumerate(value)]}
    if isinstance(value, dict):
        return _encode_dict(value, key, tensors, _depth)
    raise UnsupportedStateError(
        key,
        f"{kind.__module__}.{kind.__qualname__} is neither a tensor nor JSON-like, and nothing is pickled; "
        "give the object a state_dict() of such values, or leave it out",
    )


def decode(document: Any, path: str, tensor: Callable[[str], torch.Tensor]) -> Any:
    """The value a document stands for.

    Args:
        document: As :func:`encode` made it.
        path: For errors.
        tensor: Gives the tensor stored under a name.
    """
    if isinstance(document, list):
        return [decode(item, path, tensor) for item in document]
    if not isinstance(document, dict):
        return document
    if len(document) == 1:
        tag, content = next(iter(document.items()))
        if tag.startswith("$"):
            return _decode_tag(tag, content, path, tensor)
    return {name: decode(item, f"{path}.{name}", tensor) for name, item in document.items()}


def tensor_names(document: Any) -> list[str]:
    """Names of the tensors a document refers to."""
    if isinstance(document, list):
        return [name for item in document for name in tensor_names(item)]
    if not isinstance(document, dict):
        return []
    names: list[str] = []
    for tag, content in document.items():
        names += [content] if tag in {"$tensor", "$ndarray", "$scalar"} else tensor_names(content)
    return names


def leaves(document: Any, path: str) -> dict[str, Any]:
    """The document's leaves by dotted path, tagged values as they are decoded where that is plain JSON."""
    if isinstance(document, dict) and not any(tag.startswith("$") for tag in document):
        flat: dict[str, Any] = {}
        for name, item in document.items():
            flat |= leaves(item, f"{path}.{name}")
        return flat
    return {path: document}


def _add(key: str, tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> str:
    if key in tensors:
        raise StateError(key, "two tensors of the state would have this name")
    tensors[key] = tensor
    return key


def _encode_float(value: float) -> Any:
    return value if math.isfinite(value) else {"$float": str(value)}


def _encode_numpy(value: Any, key: str, tensors: dict[str, torch.Tensor]) -> Any:
    if value.dtype.kind not in "biuf" or not value.dtype.isnative:
        raise UnsupportedStateError(key, f"NumPy dtype {value.dtype} cannot be stored as a tensor")
    tensor = torch.from_numpy(np.array(value))
    return {"$ndarray" if isinstance(value, np.ndarray) else "$scalar": _add(key, tensor, tensors)}


def _encode_dict(value: Mapping[Any, Any], key: str, tensors: dict[str, torch.Tensor], depth: int) -> Any:
    plain = all(type(name) is str and not name.startswith("$") for name in value)
    if plain and not isinstance(value, Counter):
        return {name: encode(item, f"{key}.{name}", tensors, depth + 1) for name, item in value.items()}
    pairs: list[Any] = []
    for name, item in value.items():
        if not isinstance(name, str | int | float | bool | tuple | None):
            raise UnsupportedStateError(f"{key}[{name!r}]", f"a key of type {type(name).__name__} is not JSON-like")
        pairs.append([encode(name, f"{key}.{name}", {}, depth + 1), encode(item, f"{key}.{name}", tensors, depth + 1)])
    return {"$counter" if isinstance(value, Counter) else "$dict": pairs}


_ENCODERS: dict[type, Callable[[Any], Any]] = {
    float: _encode_float,
    bytes: lambda value: {"$bytes": base64.b64encode(value).decode()},
    torch.Size: lambda value: {"$size": list(value)},
}


def _decode_tag(tag: str, content: Any, path: str, tensor: Callable[[str], torch.Tensor]) -> Any:
    match tag:
        case "$tensor":
            return tensor(content)
        case "$ndarray":
            return tensor(content).numpy()
        case "$scalar":
            return tensor(content).numpy()[()]
        case "$float":
            return float(content)
        case "$bytes":
            return base64.b64decode(content)
        case "$size":
            return torch.Size(content)
        case "$tuple":
            return tuple(decode(item, path, tensor) for item in content)
        case "$dict" | "$counter":
            pairs = {decode(name, path, tensor): decode(item, path, tensor) for name, item in content}
            return Counter(pairs) if tag == "$counter" else pairs
        case _:
            raise StateMismatchError(path, f"the checkpoint holds a value of unknown kind {tag!r}")
