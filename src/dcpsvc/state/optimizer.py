"""torch optimizers: state by parameter FQN, complete where it exists and absent where it does not.

Unlike ``get_optimizer_state_dict`` nothing is initialised on the way: a parameter that never had a gradient has
no state, before the save and after the load. Reading state out never steps the optimizer.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from dcpsvc.errors import StateError, StateMismatchError, UnsupportedStateError
from dcpsvc.state import documents, meta
from dcpsvc.state.collected import Collected, Sharing, local_chunk
from dcpsvc.state.module import parameter_names
from dcpsvc.state.saved import Saved, Want, copy_into, like, own_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.optim import Optimizer

    from dcpsvc.state.module import ModuleComponent


_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
"""Not imported here: whoever uses it has, and it brings TorchScript along."""


class OptimizerComponent:
    """An optimizer's state and hyper-parameters.

    Where ranks have different parameters (pipeline stages, ZeRO), each writes what it has, and reads what it needs
    from whoever wrote it.

    Args:
        name: Its name in the state.
        optimizer: Any of torch's, or made like them.
        modules: The modules of the state, which give its parameters their names.
    """

    def __init__(self, name: str, optimizer: Optimizer, modules: Sequence[ModuleComponent]) -> None:
        self._name, self._optimizer, self._modules = name, optimizer, modules
        self._found: tuple[Saved | None, Any] = (None, None)

    @property
    def _inner(self) -> Optimizer:
        """The one that has state and parameters of this rank: inside a ZeroRedundancyOptimizer there is another."""
        kind = getattr(sys.modules.get(_ZERO), "ZeroRedundancyOptimizer", None)
        within: Any = self._optimizer
        found: Optimizer = within.optim if kind and isinstance(within, kind) else within
        return found

    def collect(self, into: Collected) -> None:
        """Every state tensor under ``<name>.state.<fqn>.<entry>``; the rest is one document."""
        tensors: dict[str, torch.Tensor] = {}  # step() alone changes them
        others: dict[str, torch.Tensor] = {}
        names, state = self._names(), self._inner.state
        if strange := [key for key in state if id(key) not in names]:
            raise UnsupportedStateError(f"{self._name}.state", f"an entry under {strange[0]!r:.80}, not a parameter")
        holder = self._holder(into.rank)
        own = self._name if holder is None else own_name(self._name, into.rank)
        begun = [parameter for parameter in self._parameters() if parameter in state]
        document = {
            "state": {names[id(p)]: _encode(f"{self._name}.state.{names[id(p)]}", state[p], tensors) for p in begun},
            "shapes": {names[id(p)]: list(p.shape) for p in begun},
            "param_groups": [
                _encode(f"{own}.param_groups.{index}", _without_params(group), others)
                | {"params": [names[id(parameter)] for parameter in group["params"]]}
                for index, group in enumerate(self._inner.param_groups)
            ],
        }
        (into.documents if holder is None else into.own_documents)[own] = document
        for key, tensor in tensors.items():
            if holder is None:
                into.add(key, tensor, Sharing.REPLICATED, owner=id(self._optimizer), validate=self._validate())
            else:
                into.add_part(key, tensor, holder, owner=id(self._optimizer))
        for key, tensor in others.items():
            if holder is None:
                into.add(key, tensor, Sharing.REPLICATED, validate=self._validate())
            else:
                into.add_part(key, tensor, into.rank)

    def wants(self, saved: Saved) -> list[Want]:
        """The saved state of each parameter, in the box this rank holds of that parameter."""
        meta.refuse(self._name, self._parameters())
        document = self._document(saved)
        self._check_groups(saved, document)
        wants = [
            _want(saved, key, parameter)
            for parameter, entries in self._saved_state(saved, document)
            if self._fits(saved, document, parameter)
            for key in documents.tensor_names(entries)
        ]
        groups = documents.tensor_names(document["param_groups"])
        return wants + [saved.want_whole(key) for key in groups]

    def apply(self, saved: Saved, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace state and hyper-parameters; a parameter without saved state has none afterwards."""
        document = self._document(saved)
        for groups in {id(g): g for g in (self._inner.param_groups, self._optimizer.param_groups)}.values():
            for group, values in zip(groups, document["param_groups"], strict=True):
                for name, value in values.items():
                    if name != "params":
                        group[name] = _decode(value, f"{self._name}.{name}", group.get(name), tensors.__getitem__)
        state = self._inner.state
        old = {parameter: dict(state.get(parameter, {})) for parameter in self._parameters()}
        kept = {p: old[p] for p in self._parameters() if saved.terms.skips(self._key(p)) and p in state}
        state.clear()
        state.update(kept)
        for parameter, entries in self._saved_state(saved, document):
            beside = functools.partial(self._beside, saved, tensors, parameter)
            state[parameter] = {
                name: _decode(value, f"{self._name}.{name}", old[parameter].get(name), beside)
                for name, value in entries.items()
            }

    def _document(self, saved: Saved) -> Any:
        """What was saved: by all ranks together, or by each for its own parameters, put together here."""
        if self._found[0] is not saved:
            name = saved.saved_name(self._name)
            whole = saved.documents.get(name)
            self._found = (saved, whole if whole is not None else self._merged(saved))
        return self._found[1]

    def _merged(self, saved: Saved) -> Any:
        needed = {self._saved_parameter(saved, parameter) for parameter in self._parameters()}
        merged: dict[str, Any] = {"state": {}, "shapes": {}, "param_groups": []}
        for document in saved.own_documents(self._name):
            merged["state"] |= document["state"]
            merged["shapes"] |= document["shapes"]
            merged["param_groups"] = _merged_groups(merged["param_groups"], document["param_groups"])
            needed -= {name for group in document["param_groups"] for name in group["params"]}
            if not needed:
                break
        return merged

    def _beside(
        self, saved: Saved, tensors: Mapping[str, torch.Tensor], parameter: torch.Tensor, key: str
    ) -> torch.Tensor:
        """A loaded tensor where torch would have made it: sharded like its parameter, on its device."""
        loaded = tensors[key]
        if key.endswith(".step") and self._keeps_steps_on_host(parameter):
            return loaded
        return like(parameter, loaded) if _is_boxed(saved, key, parameter) else loaded.to(parameter.device)

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self._inner.param_groups for parameter in group["params"]]

    def _holder(self, rank: int) -> int | None:
        """None: every rank has the same parameters. Else whose values count for those this rank has."""
        if self._inner is not self._optimizer:
            return rank
        parts = [component.part for component in self._own_modules() if component.part is not None]
        return parts[0].holder if parts else None

    def _validate(self) -> bool:
        return all(component.validate for component in self._own_modules())

    def _own_modules(self) -> list[ModuleComponent]:
        """The modules its parameters are in."""
        mine = {id(parameter) for parameter in self._parameters()}
        return [c for c in self._modules if any(id(p) in mine for p in c.module.parameters())]

    def _names(self) -> dict[int, str]:
        """A name for each parameter: its FQN, or its place in the groups where no module of the state has it."""
        known: dict[int, str] = {}
        for component in self._modules:
            known |= parameter_names(component.module)
        names = {
            id(parameter): known.get(id(parameter), f"group-{g}-{p}")
            for g, group in enumerate(self._inner.param_groups)
            for p, parameter in enumerate(group["params"])
        }
        if len(set(names.values())) != len(names):
            raise StateError(
                self._name, "two modules of the state have parameters of one name; use an optimizer for each"
            )
        return names

    def _key(self, parameter: torch.Tensor) -> str:
        """A parameter's key in the state."""
        for component in self._modules:
            if name := parameter_names(component.module).get(id(parameter)):
                return f"{component.name}.{name}"
        return f"{self._name}.state.{self._names()[id(parameter)]}"

    def _saved_parameter(self, saved: Saved, parameter: torch.Tensor) -> str:
        """What the checkpoint calls a parameter, in the documents of an optimizer."""
        name = self._names()[id(parameter)]
        key = self._key(parameter)
        if not key.endswith(f".{name}") or saved.saved_name(key) == key:
            return name
        return saved.saved_name(key).split(".", 1)[-1]

    def _saved_state(self, saved: Saved, document: Any) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        here = [p for p in self._parameters() if not saved.terms.skips(self._key(p))]
        by_name = {self._saved_parameter(saved, parameter): parameter for parameter in here}
        return [(by_name[name], entries) for name, entries in document["state"].items() if name in by_name]

    def _check_groups(self, saved: Saved, document: Any) -> None:
        mine = [{self._saved_parameter(saved, p): p for p in group["params"]} for group in self._inner.param_groups]
        theirs = [set(group["params"]) for group in document["param_groups"]]
        if len(mine) != len(theirs):
            reason = f"saved with {len(theirs)} parameter groups, here there are {len(mine)}"
            raise StateMismatchError(self._name, reason)
        if not saved.terms.strict:
            return
        for index, (ours, saved_names) in enumerate(zip(mine, theirs, strict=True)):
            where = f"{self._name}.param_groups.{index}"
            for name in ours.keys() - saved_names:
                if not saved.terms.skips(self._key(ours[name])):
                    saved.drift.add(f"{where}.{name}", "missing", "-", "a parameter")
            if self._holder(saved.rank) is None and self._name in saved.documents:
                for name in saved_names - ours.keys():
                    saved.drift.add(f"{where}.{name}", "unexpected", "a parameter", "-")

    def _fits(self, saved: Saved, document: Any, parameter: torch.Tensor) -> bool:
        """Whether a parameter has the shape it had; noted if it has not."""
        name = self._saved_parameter(saved, parameter)
        shape = document["shapes"].get(name)
        if shape in (None, list(parameter.shape)):
            return True
        saved.drift.add(f"{self._name}.state.{name}", "shape", f"for {shape}", f"for {list(parameter.shape)}")
        return False

    def _keeps_steps_on_host(self, parameter: torch.Tensor) -> bool:
        group = next(g for g in self._inner.param_groups if any(p is parameter for p in g["params"]))
        return not (group.get("capturable") or group.get("fused"))


def _encode(prefix: str, values: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: documents.encode(value, f"{prefix}.{name}", tensors) for name, value in values.items()}


def _merged_groups(known: list[Any], more: list[Any]) -> list[Any]:
    """Hyper-parameters of the first, parameters of all."""
    if not known:
        return more
    return [one | {"params": [*one["params"], *other["params"]]} for one, other in zip(known, more, strict=False)]


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
