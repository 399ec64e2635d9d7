"""nn.Module: plain, DDP, FSDP2 and compiled, under the model's own names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from dcpsvc.errors import StateMismatchError, UnsupportedStateError
from dcpsvc.state import documents
from dcpsvc.state.collected import Collected, Sharing
from dcpsvc.state.saved import Saved, Want, copy_into

if TYPE_CHECKING:
    from collections.abc import Mapping

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)\.")
_EXTRA = "_extra_state"


def unwrap(module: nn.Module) -> nn.Module:
    """The user's model inside DDP and torch.compile."""
    while True:
        if isinstance(module, DistributedDataParallel):
            module = cast("nn.Module", module.module)
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def fqn(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    return _WRAPPERS.sub("", name)


def parameter_names(module: nn.Module) -> dict[int, str]:
    """FQN of each parameter, by ``id``; the first name of a tied one."""
    names: dict[int, str] = {}
    for name, parameter in unwrap(module).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), fqn(name))
    return names


class ModuleComponent:
    """A module's parameters and buffers."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name, self._module = name, unwrap(module)
        for path, child in self._module.named_modules():
            if isinstance(child, FullyShardedDataParallel):
                where = f"{name}.{path}".rstrip(".")
                raise UnsupportedStateError(where, "FSDP1 modules are not supported; use fully_shard (FSDP2)")

    def collect(self, into: Collected) -> None:
        """Parameters are sharded or replicated; buffers are rank 0's; tied weights are stored once."""
        into.documents[self._name] = {}
        first_names: dict[int, str] = {}
        own = {id(tensor) for tensor in (*self._module.parameters(), *self._module.buffers())}
        for key, value in self._state().items():
            if not isinstance(value, torch.Tensor):
                into.documents[key] = documents.encode(value, key, _NoTensors(key))
            elif id(value) not in own and not key.endswith(_EXTRA):
                raise UnsupportedStateError(
                    key, "its state_dict() gives a copy here, not the parameter or buffer itself"
                )
            elif (first := first_names.setdefault(id(value), key)) != key:
                into.aliases[key] = first
            else:
                shared = Sharing.REPLICATED if isinstance(value, nn.Parameter) else Sharing.FIRST
                into.add(key, value, shared)

    def wants(self, saved: Saved) -> list[Want]:
        """Every tensor of the module; names must be the same on both sides."""
        mine = {key: value for key, value in self._state().items() if isinstance(value, torch.Tensor)}
        theirs = {key for key in saved.layout.names() if key.startswith(f"{self._name}.")}
        if missing := sorted(mine.keys() - theirs):
            raise StateMismatchError(missing[0], f"the checkpoint lacks {len(missing)} tensors of this module")
        if unexpected := sorted(theirs - mine.keys()):
            raise StateMismatchError(unexpected[0], f"the module lacks {len(unexpected)} tensors of the checkpoint")
        return [
            saved.want_like(key, value) if key.endswith(_EXTRA) else saved.want_in_place(key, value)
            for key, value in mine.items()
        ]

    def apply(self, saved: Saved, tensors: Mapping[str, torch.Tensor]) -> None:
        """Overwrite in place, so optimizers keep their parameters."""
        for key, value in self._state().items():
            if isinstance(value, torch.Tensor) and key.endswith(_EXTRA):
                self._module.get_submodule(_owner(key, self._name)).set_extra_state(tensors[key].to(value.device))
            elif isinstance(value, torch.Tensor):
                copy_into(value, tensors[key])
        for key, document in self._extra_states(saved).items():
            owner = self._module.get_submodule(_owner(key, self._name))
            owner.set_extra_state(documents.decode(document, key, _no_tensor))

    def versions(self, *, parameters_too: bool) -> list[int]:
        """Changes when a buffer, or a parameter, was written to."""
        tensors = [*self._module.buffers(), *(self._module.parameters() if parameters_too else ())]
        return [tensor._version for tensor in tensors]  # noqa: SLF001 - torch's only counter

    def _extra_states(self, saved: Saved) -> dict[str, Any]:
        prefix = f"{self._name}."
        return {k: v for k, v in saved.documents.items() if k.startswith(prefix) and k.endswith(_EXTRA)}

    def _state(self) -> dict[str, Any]:
        return {
            f"{self._name}.{fqn(name)}": value
            for name, value in self._module.state_dict(keep_vars=True).items()
            if not (name.endswith(_EXTRA) and value is None)
        }


class _NoTensors(dict[str, torch.Tensor]):
    """Refuses tensors hidden in an extra state: they have no place in the module's tensors."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self._key = key

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        raise UnsupportedStateError(name, f"a tensor inside the extra state {self._key}; register it as a buffer")


def _no_tensor(name: str) -> torch.Tensor:
    raise StateMismatchError(name, "an extra state cannot refer to a tensor")


def _owner(key: str, component: str) -> str:
    return key[len(component) + 1 :].removesuffix(_EXTRA).rstrip(".")
