"""torch optimizers: state by parameter FQN, complete where it exists and absent where it does not.

Unlike ``get_optimizer_state_dict`` nothing is initialised on the way: a parameter that never had a gradient has
no state, before the save and after the load. Reading state out never steps the optimizer.
"""

from __future__ import annotations

import bisect
import functools
from typing import TYPE_CHECKING, Any

import torch

from dcpsvc.errors import StateError, StateMismatchError, UnsupportedStateError
from dcpsvc.state import documents, meta, refill
from dcpsvc.state.collected import Collected, Sharing, local_chunk
from dcpsvc.state.optimview import View, owner_of, unwrapped
from dcpsvc.state.ragged import Ragged
from dcpsvc.state.saved import Saved, Want, like, own_name
from dcpsvc.state.sharing import Replicated, bare
from dcpsvc.state.standin import Entries

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.optim import Optimizer

    from dcpsvc.state.module import ModuleComponent
    from dcpsvc.state.sharing import Validate

_NOBODY = -1


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
        self._name, self._modules = name, modules
        self._optimizer: Optimizer = unwrapped(bare(given))
        self._declared: Validate | None = given.validate if isinstance(given, Replicated) else None
        self._found: tuple[Saved | None, Any] = (None, None)
        self._entries: Entries | None = None
        self._look()

    def collect(self, into: Collected) -> None:
        """Every state tensor under ``<name>.state.<fqn>.<entry>``; the rest is one document."""
        tensors: dict[torch.Tensor, dict[str, torch.Tensor]] = {}  # step() alone changes them
        others: dict[str, torch.Tensor] = {}
        view = self._look()
        names, state, known = self._names(), view.state, view.known
        if strange := [key for key in view.inner.state if id(key) not in known]:
            raise UnsupportedStateError(f"{self._name}.state", f"an entry under {strange[0]!r:.80}, not a parameter")
        holder = self._holder(into.rank)
        own = self._name if holder is None else own_name(self._name, into.rank)
        begun = [parameter for parameter in view.parameters if parameter in state]
        prefixes = {p: f"{self._name}.state.{names[id(p)]}" for p in begun}
        document = {
            "state": {names[id(p)]: _encode(prefixes[p], state[p], tensors.setdefault(p, {})) for p in begun},
            "shapes": {names[id(p)]: list(p.shape) for p in begun},
            "param_groups": [
                _encode(f"{own}.param_groups.{index}", _without_params(group), others)
                | {"params": [names[id(parameter)] for parameter in group["params"]]}
                for index, group in enumerate(view.param_groups)
            ],
        }
        (into.documents if holder is None else into.own_documents)[own] = document
        owner, validate, alike = owner_of(self._optimizer), self._validate(), self._alike()
        for parameter, key, tensor in ((p, key, tensor) for p in begun for key, tensor in tensors[p].items()):
            if holder is None:
                into.add(key, tensor, Sharing.REPLICATED, owner=owner, validate=validate)
            else:
                of, sharers = _sharers(parameter, tensor, holder, alike)
                into.add_part(key, tensor, of, owner=owner, alike=sharers)
        for key, tensor in others.items():
            if holder is None:
                into.add(key, tensor, Sharing.REPLICATED, validate=validate)
            else:
                into.add_part(key, tensor, into.rank)

    def wants(self, saved: Saved) -> list[Want]:
        """The saved state of each parameter, in the box this rank holds of that parameter."""
        here = self._entries = Entries(self._look())
        meta.refuse(self._name, self._view.parameters)
        document = self._document(saved)
        self._check_groups(saved, document)
        wants = [
            want
            for parameter, entries in self._saved_state(saved, document)
            if self._fits(saved, document, parameter)
            for name, value in entries.items()
            for want in self._wanted(saved, here, parameter, name, value)
        ]
        groups = documents.tensor_names(document["param_groups"])
        return wants + [saved.want_whole(key) for key in groups]

    def apply(self, saved: Saved, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace state and hyper-parameters; a parameter without saved state has none afterwards."""
        document, view, here = self._document(saved), self._view, self._entries or Entries(self._view)
        for index, (group, values) in enumerate(zip(view.param_groups, document["param_groups"], strict=True)):
            loaded = {
                name: refill.decoded(value, f"{self._name}.{name}", group.get(name), tensors.__getitem__)
                for name, value in values.items()
                if name != "params"
            }
            view.set_hyperparameters(index, loaded)
        old = view.state
        new = {p: old[p] for p in view.parameters if p in old and saved.terms.skips(self._key(p))}
        for parameter, entries in self._saved_state(saved, document):
            beside, before = functools.partial(self._beside, saved, tensors, parameter), old.get(parameter, {})
            if documents.wrapper_names(entries):
                before = here.of(self._key(parameter), parameter)
            new[parameter] = {
                name: refill.put(value[documents.WRAPPER], before[name], tensors, saved.rank)
                if documents.wrapper_names(value)
                else refill.decoded(value, f"{self._name}.{name}", before.get(name), beside)
                for name, value in entries.items()
            }
        view.put(new)
        self._entries = None

    def _wanted(self, saved: Saved, here: Entries, parameter: torch.Tensor, name: str, value: Any) -> list[Want]:
        key = f"{self._name}.state.{self._names()[id(parameter)]}.{name}"
        found = here.wants(saved, key, parameter, value)
        return [_want(saved, its, parameter) for its in documents.tensor_names(value)] if found is None else found

    def _document(self, saved: Saved) -> Any:
        """What was saved: by all ranks together, or by each for its own parameters, put together here."""
        if self._found[0] is not saved:
            name = saved.saved_name(self._name)
            whole = saved.documents.get(name)
            self._found = (saved, whole if whole is not None else self._merged(saved))
        return self._found[1]

    def _merged(self, saved: Saved) -> Any:
        needed = {self._saved_parameter(saved, parameter) for parameter in self._view.parameters}
        merged: dict[str, Any] = {"state": {}, "shapes": {}, "param_groups": []}
        for document in saved.own_documents(self._name):
            merged["state"] |= document["state"]
            merged["shapes"] |= document["shapes"]
            merged["param_groups"] = _merged_groups(merged["param_groups"], document["param_groups"])
            needed -= {name for group in document["param_groups"] for name in group["params"]}
            if not needed:
                break
        tensors = saved.layout.names()
        for parameter in self._view.wanted():
            name = self._saved_parameter(saved, parameter)
            if name not in merged["state"]:
                self._add_elsewhere(saved, name, tensors, merged)
        return merged

    def _add_elsewhere(self, saved: Saved, name: str, tensors: list[str], merged: dict[str, Any]) -> None:
        """State of a parameter that was on other ranks only: those that wrote its tensors have it in their document."""
        component = saved.saved_name(self._name)
        for writer in _writers(saved, tensors, f"{component}.state.{name}."):
            document = saved.document_of(writer, component) or {"state": {}, "shapes": {}}
            merged["state"] = document["state"] | merged["state"]
            merged["shapes"] = document["shapes"] | merged["shapes"]
            if name in merged["state"]:
                return

    def _beside(
        self, saved: Saved, tensors: Mapping[str, torch.Tensor], parameter: torch.Tensor, key: str
    ) -> torch.Tensor:
        """A loaded tensor where torch would have made it: sharded like its parameter, on its device."""
        loaded = tensors[key]
        if key.endswith(".step") and self._keeps_steps_on_host(parameter):
            return loaded
        return like(parameter, loaded) if _is_boxed(saved, key, parameter) else loaded.to(parameter.device)

    def _look(self) -> View:
        members = [member for component in self._modules for member in component.sharded.members]
        self._by_module = [(component, component.parameter_names()) for component in self._modules]
        self._named: dict[int, str] | None = None
        self._view = View(self._name, self._optimizer, members)
        return self._view

    def _holder(self, rank: int) -> int | None:
        """None: every rank has the same parameters. Else whose values count for those this rank has."""
        if self._view.inner is not self._optimizer:
            return rank
        parts = [component.part for component in self._own_modules() if component.part is not None]
        if parts:
            return parts[0].holder
        return 0 if self._view.is_own else None

    def _alike(self) -> tuple[int, ...]:
        """The ranks that hold the same part of the model."""
        parts = [component.part for component in self._own_modules() if component.part is not None]
        return parts[0].ranks if parts and self._view.inner is self._optimizer else ()

    def _validate(self) -> Validate:
        if self._declared is not None:
            return self._declared
        said = {component.validate for component in self._own_modules()}
        if "off" in said:
            return "off"
        return "full" if "full" in said else "hash"

    def _own_modules(self) -> list[ModuleComponent]:
        """The modules its parameters are in."""
        mine = {id(parameter) for parameter in self._view.parameters}
        return [component for component, names in self._by_module if not mine.isdisjoint(names)]

    def _names(self) -> dict[int, str]:
        """A name for each parameter: its FQN, or its place in the groups where no module of the state has it."""
        if self._named is not None:
            return self._named
        known: dict[int, str] = {}
        for _, its_names in self._by_module:
            known |= its_names
        names = {
            id(parameter): known.get(id(parameter), f"group-{g}-{p}")
            for g, group in enumerate(self._view.param_groups)
            for p, parameter in enumerate(group["params"])
        }
        if len(set(names.values())) != len(names):
            raise StateError(
                self._name, "two modules of the state have parameters of one name; use an optimizer for each"
            )
        self._named = names
        return names

    def _key(self, parameter: torch.Tensor) -> str:
        """A parameter's key in the state."""
        for component, names in self._by_module:
            if name := names.get(id(parameter)):
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
        here = [p for p in self._view.wanted() if not saved.terms.skips(self._key(p))]
        by_name = {self._saved_parameter(saved, parameter): parameter for parameter in here}
        return [(by_name[name], entries) for name, entries in document["state"].items() if name in by_name]

    def _check_groups(self, saved: Saved, document: Any) -> None:
        mine = [{self._saved_parameter(saved, p): p for p in group["params"]} for group in self._view.param_groups]
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
        group = next(g for g in self._view.param_groups if any(p is parameter for p in g["params"]))
        return not (group.get("capturable") or group.get("fused"))


def _sharers(
    parameter: torch.Tensor, tensor: torch.Tensor, holder: int, alike: tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """Whose entry counts, and who has the same: of what there is once for a parameter, those with its first element."""
    if not isinstance(parameter, Ragged) or isinstance(tensor, Ragged):
        return holder, alike
    if not parameter.leads or not parameter.holders.count(holder):
        return _NOBODY, ()
    return parameter.holders.alike[0], parameter.holders.alike


def _writers(saved: Saved, names: list[str], prefix: str) -> Iterator[int]:
    """Ranks that wrote those of the tensors ``names``, in order, that begin so; each once."""
    seen = set[int]()
    for name in names[bisect.bisect_left(names, prefix) :]:
        if not name.startswith(prefix):
            return
        for chunk in saved.tensor(name).chunks:
            if chunk.rank not in seen:
                seen.add(chunk.rank)
                yield chunk.rank


def _encode(prefix: str, values: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    found = {name: documents.encode(value, f"{prefix}.{name}", tensors) for name, value in values.items()}
    for name, value in values.items():
        if not isinstance(value, torch.Tensor) and (within := documents.wrapper_names(found[name])):
            raise UnsupportedStateError(
                within[0], "a tensor made of others can be an entry, not in a list or dict of one"
            )
    return found


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
