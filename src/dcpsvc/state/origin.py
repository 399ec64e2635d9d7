"""What a module says about itself beside its tensors: the configuration of its library, its adapters, their base.

Kept as one JSON document with the module, so that a folder of the library can be made of a checkpoint without its code,
and so that an adapter is not loaded over another base.
"""

from __future__ import annotations

import json
from enum import Enum
from typing import TYPE_CHECKING, Any

from dcpsvc.format.digest import digest
from dcpsvc.format.parse import compact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch
    from torch import nn


def described(module: nn.Module, fqn: Callable[[str], str]) -> dict[str, Any]:
    """Configurations as JSON: ``config`` of transformers, ``peft`` by the place and name of each adapter."""
    found: dict[str, Any] = {}
    if (config := _config(module)) is not None:
        found["config"] = config
    if adapters := _adapters(module, fqn):
        found["peft"] = adapters
    return found


def structure(frozen: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of the tensors that are not saved: a digest of their names and shapes."""
    tensors = sorted(frozen, key=lambda pair: pair[0])
    return digest(compact([[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors]))


def base_name(module: nn.Module) -> str:
    """What the base of the adapters is called; empty where nothing says so."""
    for child in module.modules():
        for config in _peft_configs(child).values():
            if name := getattr(config, "base_model_name_or_path", None):
                return str(name)
    return ""


def _config(module: nn.Module) -> Any:
    """The configuration that transformers would write beside the weights."""
    for owner in (module, getattr(module, "base_model", None)):
        dump = getattr(getattr(owner, "config", None), "to_json_string", None)
        if callable(dump):
            return json.loads(str(dump()))
    return None


def _adapters(module: nn.Module, fqn: Callable[[str], str]) -> dict[str, dict[str, Any]]:
    """Place of each wrapped model, then adapter name, to its configuration."""
    found: dict[str, dict[str, Any]] = {}
    for path, child in module.named_modules():
        place = fqn(f"{path}.").rstrip(".")
        if any(place == other or place.startswith(f"{other}." if other else "") for other in found):
            continue
        if configs := _peft_configs(child):
            found[place] = {name: _plain(config.to_dict()) for name, config in configs.items()}
    return found


def _peft_configs(module: nn.Module) -> Mapping[str, Any]:
    configs = getattr(module, "peft_config", None)
    if not isinstance(configs, dict) or not all(hasattr(config, "to_dict") for config in configs.values()):
        return {}
    return configs


def _plain(value: Any) -> Any:
    """JSON of a PEFT configuration, as PEFT itself would write it."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
