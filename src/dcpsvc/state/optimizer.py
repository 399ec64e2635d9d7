"""torch optimizers: state by parameter FQN, complete where it exists and absent where it does not.

Unlike ``get_optimizer_state_dict`` nothing is initialised on the way: a parameter that never had a gradient has
no state, before the save and after the load. Reading state out never steps the optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dcpsvc.errors import UnsupportedStateError
from dcpsvc.state import documents, meta
from dcpsvc.state.collected import Collected, Sharing
from dcpsvc.state.optimnames import Names
from dcpsvc.state.optimsaved import SavedOptimizer
from dcpsvc.state.optimunsaved import Unsaved
from dcpsvc.state.optimview import View, refuse_own_state, unwrapped
from dcpsvc.state.ragged import Ragged
from dcpsvc.state.saved import own_name
from dcpsvc.state.sharing import Replicated, bare

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.optim import Optimizer

    from dcpsvc.state.module import ModuleComponent
    from dcpsvc.state.saved import Saved, Want
    from dcpsvc.state.sharing import Validate

_NOBODY = -1

Tensors = dict[str, torch.Tensor]


class OptimizerComponent:
    """An optimizer's state and hyper-parameters.

    Where ranks have different parameters (pipeline stages, ZeRO, FSDP1), each writes what it has, and reads what it
    needs from whoever wrote it.

    Args:
        name: Its name in the state.
        given: Any of torch's, or made like them; or :class:`~dcpsvc.state.sharing.Replicated` of one. Without that,
            it is compared as its modules are.
        modules: The modules of the state, which give its parameters their names.
    """

    def __init__(self, name: str, given: Any, modules: Sequence[ModuleComponent]) -> None:
        self._name, self._modules, self._declaration = name, modules, given
        self._given: Optimizer = bare(given)
        self._declared: Validate | None = given.validate if isinstance(given, Replicated) else None
        self._unsaved = Unsaved(name, self._given)
        self._look()

    def is_of(self, given: Any, modules: Sequence[ModuleComponent]) -> bool:
        """Whether it is of this very optimizer, with names from these modules."""
        return given is self._declaration and list(modules) == list(self._modules)

    def collect(self, into: Collected) -> None:
        """Every state tensor under ``<name>.state.<fqn>.<entry>``; the rest is one document."""
        self._look()
        self._unsaved.look(tell=into.rank == 0)
        holder = self._holder(into.rank)
        own = self._name if holder is None else own_name(self._name, into.rank)
        tensors: dict[torch.Tensor, Tensors] = {}  # step() alone changes them
        others: Tensors = {}
        document = self._document(own, tensors, others)
        if holder is None:
            into.documents[own] = document
            self._add_shared(into, tensors, others)
        else:
            into.own_documents[own] = document
            self._add_own(into, holder, tensors, others)

    def wants(self, saved: Saved) -> list[Want]:
        """The saved state of each parameter, in the box this rank holds of it; moments into those it has, if any."""
        meta.refuse(self._name, self._look().parameters)
        return self._as_saved(saved).wants(is_shared=self._holder(saved.rank) is None)

    def apply(self, saved: Saved, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace state and hyper-parameters; a parameter without saved state has none afterwards."""
        found, view = self._as_saved(saved), self._view
        for index, values in enumerate(found.hyperparameters(tensors)):
            view.set_hyperparameters(index, values)
        view.put(found.state(tensors))

    def _look(self) -> View:
        refuse_own_state(self._name, self._given)
        members = [member for component in self._modules for member in component.sharded.members]
        self._view = View(self._name, unwrapped(self._given), members)  # those it holds may have been exchanged
        self._names = Names(self._name, self._view, self._modules)
        self._found: tuple[Saved, SavedOptimizer] | None = None
        return self._view

    def _as_saved(self, saved: Saved) -> SavedOptimizer:
        """Read once for each checkpoint."""
        if self._found is None or self._found[0] is not saved:
            self._found = saved, SavedOptimizer(saved, self._name, self._view, self._names)
        return self._found[1]

    def _document(self, own: str, tensors: dict[torch.Tensor, Tensors], others: Tensors) -> Any:
        """What is no tensor; those of each parameter, and of the groups, are left in the arguments."""
        view, names = self._view, self._names.by_id
        state = view.state
        if strange := view.strange:
            raise UnsupportedStateError(f"{self._name}.state", f"an entry under {strange[0]!r:.80}, not a parameter")
        begun = {p: names[id(p)] for p in view.parameters if p in state}
        return {
            "state": {
                name: _encode(f"{self._name}.state.{name}", state[p], tensors.setdefault(p, {}))
                for p, name in begun.items()
            },
            "shapes": {name: list(p.shape) for p, name in begun.items()},
            "param_groups": [
                _encode(f"{own}.param_groups.{index}", _without_params(group), others)
                | {"params": [names[id(parameter)] for parameter in group["params"]]}
                for index, group in enumerate(view.param_groups)
            ],
        }

    def _add_shared(self, into: Collected, tensors: dict[torch.Tensor, Tensors], others: Tensors) -> None:
        """Every rank has the same parameters."""
        owners, validate = self._view.owners, self._validate()
        for parameter, entries in tensors.items():
            for key, tensor in entries.items():
                into.add(key, tensor, Sharing.REPLICATED, owner=owners[id(parameter)], validate=validate)
        for key, tensor in others.items():
            into.add(key, tensor, Sharing.REPLICATED, validate=validate)

    def _add_own(self, into: Collected, holder: int, tensors: dict[torch.Tensor, Tensors], others: Tensors) -> None:
        owners, alike = self._view.owners, self._alike()
        for parameter, entries in tensors.items():
            for key, tensor in entries.items():
                of, sharers = _sharers(parameter, tensor, holder, alike)
                into.add_part(key, tensor, of, owner=owners[id(parameter)], alike=sharers)
        for key, tensor in others.items():
            into.add_part(key, tensor, into.rank)

    def _holder(self, rank: int) -> int | None:
        """None: every rank has the same parameters. Else whose values count for those this rank has."""
        if self._view.is_divided:
            return rank
        parts = [component.part for component in self._names.modules() if component.part is not None]
        if parts:
            return parts[0].holder
        return 0 if self._view.is_own else None

    def _alike(self) -> tuple[int, ...]:
        """The ranks that hold the same part of the model."""
        parts = [component.part for component in self._names.modules() if component.part is not None]
        return parts[0].ranks if parts and not self._view.is_divided else ()

    def _validate(self) -> Validate:
        if self._declared is not None:
            return self._declared
        said = {component.validate for component in self._names.modules()}
        if "off" in said:
            return "off"
        return "full" if "full" in said else "hash"


def _sharers(
    parameter: torch.Tensor, tensor: torch.Tensor, holder: int, alike: tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """Whose entry counts, and who has the same: of what there is once for a parameter, those with its first element."""
    if not isinstance(parameter, Ragged) or isinstance(tensor, Ragged):
        return holder, alike
    if not parameter.leads or not parameter.holders.count(holder):
        return _NOBODY, ()
    return parameter.holders.alike[0], parameter.holders.alike


def _encode(prefix: str, values: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    found = {name: documents.encode(value, f"{prefix}.{name}", tensors) for name, value in values.items()}
    for name, value in values.items():
        if not isinstance(value, torch.Tensor) and (within := documents.wrapper_names(found[name])):
            reason = "a tensor made of others can be an entry, not in a list or dict of one"
            raise UnsupportedStateError(within[0], reason)
    return found


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
