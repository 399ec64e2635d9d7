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
from dcpsvc.state import inner

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping

TENSOR = "$tensor"
"""Stands for a tensor."""

WRAPPER = "$wrapper"
"""Stands for a tensor that is stored as those inside it."""

_PLAIN = (str, int, bool, type(None))
_MAX_DEPTH = 200
_MAX_ITEM_NBYTES = 8
_MAX_INT_BITS = 10_000
"""JSON of longer ints is refused by Python's own reader."""


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
    if kind is int and value.bit_length() > _MAX_INT_BITS:
        raise UnsupportedStateError(key, f"an int of {value.bit_length()} bits; store it as a str or bytes")
    if kind in _PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, key, tensors)
    if encoder := _ENCODERS.get(kind):
        return encoder(value)
    if kind in {np.ndarray, np.memmap} or isinstance(value, np.generic):
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
            try:
                return _decode_tag(tag, content, path, tensor)
            except (TypeError, ValueError) as err:
                raise StateMismatchError(path, f"the checkpoint holds a malformed {tag}: {err}") from err
    return {name: decode(item, f"{path}.{name}", tensor) for name, item in document.items()}


def tensor_names(document: Any) -> list[str]:
    """Names of the tensors a document refers to."""
    return _names(document, {TENSOR, "$ndarray", "$scalar"})


def wrapper_names(document: Any) -> list[str]:
    """Names of the tensors a document refers to that are stored as those inside them."""
    return _names(document, {WRAPPER})


def kind_of(document: Any) -> str:
    """``$tensor``, ``dict``, or ``value`` for everything else."""
    if not isinstance(document, dict):
        return "value"
    tag = next(iter(document), "")
    if tag in {TENSOR, WRAPPER}:
        return TENSOR
    return "dict" if tag in {"$dict", "$counter"} or not tag.startswith("$") else "value"


def leaves(document: Any, path: str, but: Container[str] = ()) -> dict[str, Any]:
    """The document's leaves by dotted path, tagged values as they are decoded where that is plain JSON.

    Args:
        document: As :func:`encode` made it.
        path: Where it stands.
        but: Names of tensors that are left out.
    """
    flat: dict[str, Any] = {}
    _flatten(document, path, flat, but)
    return flat


def values(document: Any, path: str) -> dict[str, Any]:
    """Likewise, without what is stored as other tensors, of which nothing can be made here."""
    return {name: leaf for name, leaf in leaves(document, path).items() if not wrapper_names(leaf)}


def _names(document: Any, tags: set[str]) -> list[str]:
    if isinstance(document, list):
        return [name for item in document for name in _names(item, tags)]
    if not isinstance(document, dict):
        return []
    names: list[str] = []
    for tag, content in document.items():
        names += [content] if tag in tags else _names(content, tags)
    return names


def _flatten(document: Any, path: str, flat: dict[str, Any], but: Container[str]) -> None:
    if not isinstance(document, dict) or any(map(_is_tag, document)):
        flat[path] = document
        return
    for name, item in document.items():
        if not (but and type(item) is dict and item.get(TENSOR, "") in but):  # of 100,000, most are
            _flatten(item, f"{path}.{name}", flat, but)


def _is_tag(name: str) -> bool:
    return name[:1] == "$"


def _add(key: str, tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> str:
    if key in tensors:
        raise StateError(key, "two tensors of the state would have this name")
    tensors[key] = tensor
    return key


def _encode_tensor(value: torch.Tensor, key: str, tensors: dict[str, torch.Tensor]) -> Any:
    if inner.is_wrapper(value):  # detached, it would not be the one that is changed
        return {WRAPPER: _add(key, value, tensors)}
    return {TENSOR: _add(key, value.detach() if value.requires_grad else value, tensors)}


def _encode_float(value: float) -> Any:
    return value if math.isfinite(value) else {"$float": str(value)}


def _encode_numpy(value: Any, key: str, tensors: dict[str, torch.Tensor]) -> Any:
    if value.dtype.kind not in "biuf" or not value.dtype.isnative or value.dtype.itemsize > _MAX_ITEM_NBYTES:
        raise UnsupportedStateError(key, f"NumPy dtype {value.dtype} cannot be stored as a tensor")
    whole = isinstance(value, np.ndarray) and value.flags.writeable and value.flags.c_contiguous
    tensor = torch.from_numpy(value if whole else np.array(value))
    return {"$ndarray" if isinstance(value, np.ndarray) else "$scalar": _add(key, tensor, tensors)}


def _encode_dict(value: Mapping[Any, Any], key: str, tensors: dict[str, torch.Tensor], depth: int) -> Any:
    plain = all(type(name) is str and not name.startswith("$") for name in value)
    if plain and not isinstance(value, Counter):
        return {name: encode(item, f"{key}.{name}", tensors, depth + 1) for name, item in value.items()}
    pairs: list[Any] = []
    for name, item in value.items():
        pairs.append([_encode_key(name, key), encode(item, f"{key}.{name}", tensors, depth + 1)])
    return {"$counter" if isinstance(value, Counter) else "$dict": pairs}


def _encode_key(name: Any, key: str) -> Any:
    if type(name) is tuple:
        return {"$tuple": [_encode_key(part, key) for part in name]}
    if type(name) not in {*_PLAIN, float}:
        raise UnsupportedStateError(f"{key}[{name!r}]", f"a key of type {type(name).__name__} is not JSON-like")
    return _encode_float(name) if type(name) is float else name


_ENCODERS: dict[type, Callable[[Any], Any]] = {
    float: _encode_float,
    bytes: lambda value: {"$bytes": base64.b64encode(value).decode()},
    torch.Size: lambda value: {"$size": list(value)},
}


def _decode_tag(tag: str, content: Any, path: str, tensor: Callable[[str], torch.Tensor]) -> Any:
    match tag:
        case "$tensor" | "$wrapper":
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
