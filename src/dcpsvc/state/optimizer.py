"""torch optimizers: state by parameter FQN, complete where it exists and absent where it does not.

Unlike ``get_optimizer_state_dict`` nothing is initialised on the way: a parameter that never had a gradient has
no state, before the save and after the load. Reading state out never steps the optimizer.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from dcpsvc.errors import StateError, StateMismatchError, UnsupportedStateError
from dcpsvc.state import documents
from dcpsvc.state.collected import Collected, Sharing, local_chunk
from dcpsvc.state.module import parameter_names
from dcpsvc.state.saved import Saved, Want, copy_into, like

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn
    from torch.optim import Optimizer


class OptimizerComponent:
    """An optimizer's state and hyper-parameters."""

    def __init__(self, name: str, optimizer: Optimizer, modules: Sequence[nn.Module]) -> None:
        self._name, self._optimizer, self._modules = name, optimizer, modules

    def collect(self, into: Collected) -> None:
        """Every state tensor under ``<name>.state.<fqn>.<entry>``; the rest is one document."""
        tensors: dict[str, torch.Tensor] = {}  # step() alone changes them
        others: dict[str, torch.Tensor] = {}
        names = self._names()
        if strange := [key for key in self._optimizer.state if id(key) not in names]:
            raise UnsupportedStateError(f"{self._name}.state", f"an entry under {strange[0]!r:.80}, not a parameter")
        document = {
            "state": {
                names[id(parameter)]: self._encode(
                    f"state.{names[id(parameter)]}", self._optimizer.state[parameter], tensors
                )
                for group in self._optimizer.param_groups
                for parameter in group["params"]
                if parameter in self._optimizer.state
            },
            "shapes": {
                names[id(parameter)]: list(parameter.shape)
                for parameter in self._parameters()
                if parameter in self._optimizer.state
            },
            "param_groups": [
                self._encode(f"param_groups.{index}", _without_params(group), others)
                | {"params": [names[id(parameter)] for parameter in group["params"]]}
                for index, group in enumerate(self._optimizer.param_groups)
            ],
        }
        into.documents[self._name] = document
        for key, tensor in tensors.items():
            into.add(key, tensor, Sharing.REPLICATED, id(self._optimizer))
        for key, tensor in others.items():
            into.add(key, tensor, Sharing.REPLICATED)

    def wants(self, saved: Saved) -> list[Want]:
        """The saved state of each parameter, in the box this rank holds of that parameter."""
        document = saved.document(self._name)
        self._check_groups(document)
        self._check_shapes(document)
        wants = [
            _want(saved, key, parameter)
            for parameter, entries in self._saved_state(document)
            for key in documents.tensor_names(entries)
        ]
        groups = documents.tensor_names(document["param_groups"])
        return wants + [saved.want_whole(key) for key in groups]

    def apply(self, saved: Saved, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace state and hyper-parameters; a parameter without saved state has none afterwards."""
        document = saved.document(self._name)
        for group, values in zip(self._optimizer.param_groups, document["param_groups"], strict=True):
            for name, value in values.items():
                if name != "params":
                    group[name] = _decode(value, f"{self._name}.{name}", group.get(name), tensors.__getitem__)
        old = {parameter: dict(self._optimizer.state.get(parameter, {})) for parameter in self._parameters()}
        self._optimizer.state.clear()
        for parameter, entries in self._saved_state(document):
            beside = functools.partial(self._beside, saved, tensors, parameter)
            self._optimizer.state[parameter] = {
                name: _decode(value, f"{self._name}.{name}", old[parameter].get(name), beside)
                for name, value in entries.items()
            }

    def _beside(
        self, saved: Saved, tensors: Mapping[str, torch.Tensor], parameter: torch.Tensor, key: str
    ) -> torch.Tensor:
        """A loaded tensor where torch would have made it: sharded like its parameter, on its device."""
        loaded = tensors[key]
        if key.endswith(".step") and self._keeps_steps_on_host(parameter):
            return loaded
        return like(parameter, loaded) if _is_boxed(saved, key, parameter) else loaded.to(parameter.device)

    def _encode(self, path: str, values: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        prefix = f"{self._name}.{path}"
        return {name: documents.encode(value, f"{prefix}.{name}", tensors) for name, value in values.items()}

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _names(self) -> dict[int, str]:
        """A name for each parameter: its FQN, or its place in the groups where no module of the state has it."""
        known: dict[int, str] = {}
        for module in self._modules:
            known |= parameter_names(module)
        names = {
            id(parameter): known.get(id(parameter), f"group-{g}-{p}")
            for g, group in enumerate(self._optimizer.param_groups)
            for p, parameter in enumerate(group["params"])
        }
        if len(set(names.values())) != len(names):
            raise StateError(
                self._name, "two modules of the state have parameters of one name; use an optimizer for each"
            )
        return names

    def _saved_state(self, document: Any) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        names = self._names()
        by_name = {names[id(parameter)]: parameter for parameter in self._parameters()}
        return [(by_name[name], entries) for name, entries in document["state"].items()]

    def _check_groups(self, document: Any) -> None:
        names = self._names()
        mine = [sorted(names[id(p)] for p in group["params"]) for group in self._optimizer.param_groups]
        theirs = [sorted(group["params"]) for group in document["param_groups"]]
        if mine == theirs:
            return
        if len(mine) != len(theirs):
            reason = f"saved with {len(theirs)} parameter groups, here there are {len(mine)}"
            raise StateMismatchError(self._name, reason)
        index, ours, saved = next((i, m, t) for i, (m, t) in enumerate(zip(mine, theirs, strict=True)) if m != t)
        odd = sorted(set(ours) ^ set(saved))[:3]
        raise StateMismatchError(f"{self._name}.param_groups.{index}", f"parameters differ: {', '.join(odd)}")

    def _check_shapes(self, document: Any) -> None:
        names = self._names()
        for parameter in self._parameters():
            name = names[id(parameter)]
            shape = document["shapes"].get(name)
            if shape not in (None, list(parameter.shape)):
                key = f"{self._name}.state.{name}"
                raise StateMismatchError(
                    key, f"saved for a parameter of shape {shape}, here it is {list(parameter.shape)}"
                )

    def _keeps_steps_on_host(self, parameter: torch.Tensor) -> bool:
        group = next(g for g in self._optimizer.param_groups if any(p is parameter for p in g["params"]))
        return not (group.get("capturable") or group.get("fused"))


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _want(saved: Saved, key: str, parameter: torch.Tensor) -> Want:
    return saved.want_box(key, *local_chunk(parameter)) if _is_boxed(saved, key, parameter) else saved.want_whole(key)


def _is_boxed(saved: Saved, key: str, parameter: torch.Tensor) -> bool:
    """Moments have the parameter's shape, so they are sharded as it is; counters and the like are whole."""
    return parameter.dim() > 0 and saved.tensor(key).shape == tuple(parameter.shape)


def _decode(value: Any, path: str, old: Any, loaded: Callable[[str], torch.Tensor]) -> Any:
    """A saved value; a tensor goes into the old one where that fits, so captured graphs stay valid."""

    def tensor(key: str) -> torch.Tensor:
        new = loaded(key)
        if not isinstance(old, torch.Tensor) or old.dtype != new.dtype or old.shape != new.shape:
            return new
        copy_into(old, new.to_local() if isinstance(new, DTensor) else new)
        return old

    return documents.decode(value, path, tensor)
