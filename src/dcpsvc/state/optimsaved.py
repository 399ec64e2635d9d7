"""An optimizer as a checkpoint has it, and what this rank takes of that.

A parameter without saved state has none afterwards, and hyper-parameters are those that were saved.
"""

from __future__ import annotations

import bisect
import functools
from typing import TYPE_CHECKING, Any

import torch

from dcpsvc.errors import StateMismatchError
from dcpsvc.state import documents, refill
from dcpsvc.state.chunks import local_chunk
from dcpsvc.state.saved import into, like
from dcpsvc.state.standin import Entries

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from dcpsvc.state.optimnames import Names
    from dcpsvc.state.optimview import State, View
    from dcpsvc.state.saved import Saved, Want


class SavedOptimizer:
    """What was saved: by all ranks together, or by each for its own parameters, put together here.

    Args:
        saved: The checkpoint.
        component: The optimizer's name in the state.
        view: What it is loaded into.
        names: Of its parameters.
    """

    def __init__(self, saved: Saved, component: str, view: View, names: Names) -> None:
        self._saved, self._component, self._view, self._names = saved, component, view, names
        whole = saved.documents.get(saved.saved_name(component))
        self._document = whole if whole is not None else self._merged()
        self._there: Entries | None = None

    def wants(self, *, is_shared: bool) -> list[Want]:
        """The saved state of each parameter, in the box this rank holds of it; moments into those it has, if any.

        Args:
            is_shared: Every rank here has the same parameters.

        Raises:
            StateMismatchError: It has another number of parameter groups.
        """
        self._check_groups(is_shared=is_shared)
        old, there = self._view.state, Entries(self._view)
        self._there = there
        wants = [
            want
            for parameter, entries in self._entries()
            if self._fits(parameter)
            for name, value in entries.items()
            for want in self._wanted(there, parameter, name, value, old.get(parameter, {}).get(name))
        ]
        groups = documents.tensor_names(self._document["param_groups"])
        return wants + [self._saved.want_whole(key) for key in groups]

    def hyperparameters(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
        """Of each group, as they were."""
        for group, values in zip(self._view.param_groups, self._document["param_groups"], strict=True):
            yield {
                name: refill.decoded(value, f"{self._component}.{name}", group.get(name), tensors.__getitem__)
                for name, value in values.items()
                if name != "params"
            }

    def state(self, tensors: Mapping[str, torch.Tensor]) -> State:
        """All state from now on; of parameters that are skipped, what they have. Under the saved hyper-parameters."""
        view, old, there = self._view, self._view.state, self._there or Entries(self._view)
        self._there = None  # it holds the old state
        new = {p: old[p] for p in view.parameters if p in old and self._saved.terms.skips(self._names.key(p))}
        for parameter, entries in self._entries():
            beside, before = functools.partial(self._beside, tensors, parameter), old.get(parameter, {})
            if documents.wrapper_names(entries):
                before = there.of(self._names.key(parameter), parameter)
            new[parameter] = {
                name: refill.put(value[documents.WRAPPER], before[name], tensors, self._saved.rank)
                if documents.wrapper_names(value)
                else refill.decoded(value, f"{self._component}.{name}", before.get(name), beside)
                for name, value in entries.items()
            }
        return new

    def _wanted(self, there: Entries, parameter: torch.Tensor, name: str, value: Any, old: Any) -> Iterable[Want]:
        key = f"{self._component}.state.{self._names.by_id[id(parameter)]}.{name}"
        found = there.wants(self._saved, key, parameter, value)
        return _wants(self._saved, value, parameter, old) if found is None else found

    def _merged(self) -> Any:
        saved, merged = self._saved, _nothing()
        needed = {self._names.saved(saved, parameter) for parameter in self._view.parameters}
        for document in saved.own_documents(self._component):
            merged["state"] |= document["state"]
            merged["shapes"] |= document["shapes"]
            merged["param_groups"] = _merged_groups(merged["param_groups"], document["param_groups"])
            needed -= {name for group in document["param_groups"] for name in group["params"]}
            if not needed:
                break
        tensors = saved.layout.names()
        for name in (self._names.saved(saved, parameter) for parameter in self._view.wanted()):
            if name not in merged["state"]:
                self._add_elsewhere(name, tensors, merged)
        return merged

    def _add_elsewhere(self, name: str, tensors: list[str], merged: dict[str, Any]) -> None:
        """State of a parameter that was on other ranks only: those that wrote its tensors have it in their document."""
        component = self._saved.saved_name(self._component)
        for writer in _writers(self._saved, tensors, f"{component}.state.{name}."):
            document = self._saved.document_of(writer, component) or _nothing()
            merged["state"] = document["state"] | merged["state"]
            merged["shapes"] = document["shapes"] | merged["shapes"]
            if name in merged["state"]:
                return

    def _entries(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """What was saved of each parameter that this rank is to have."""
        here = [p for p in self._view.wanted() if not self._saved.terms.skips(self._names.key(p))]
        by_name = {self._names.saved(self._saved, parameter): parameter for parameter in here}
        return [(by_name[name], entries) for name, entries in self._document["state"].items() if name in by_name]

    def _check_groups(self, *, is_shared: bool) -> None:
        saved = self._saved
        mine = [{self._names.saved(saved, p): p for p in group["params"]} for group in self._view.param_groups]
        theirs = [set(group["params"]) for group in self._document["param_groups"]]
        if len(mine) != len(theirs):
            reason = f"saved with {len(theirs)} parameter groups, here there are {len(mine)}"
            raise StateMismatchError(self._component, reason)
        for index, (ours, saved_names) in enumerate(zip(mine, theirs, strict=True)):
            where = f"{self._component}.param_groups.{index}"
            for name in ours.keys() - saved_names:
                if not saved.terms.skips(self._names.key(ours[name])):
                    saved.drift.add(f"{where}.{name}", "missing", "-", "a parameter")
            if is_shared and saved.saved_name(self._component) in saved.documents:
                for name in saved_names - ours.keys():
                    saved.drift.add(f"{where}.{name}", "unexpected", "a parameter", "-")

    def _fits(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter has the shape it had; noted if it has not."""
        name = self._names.saved(self._saved, parameter)
        shape = self._document["shapes"].get(name)
        if shape in (None, list(parameter.shape)):
            return True
        key = f"{self._component}.state.{name}"
        self._saved.drift.add(key, "shape", f"for {shape}", f"for {list(parameter.shape)}")
        return False

    def _beside(self, tensors: Mapping[str, torch.Tensor], parameter: torch.Tensor, key: str) -> torch.Tensor:
        """A loaded tensor where torch would have made it: sharded like its parameter, on its device."""
        loaded = tensors[key]
        if key.endswith(".step") and self._keeps_steps_on_host(parameter):
            return loaded
        return like(parameter, loaded) if _is_boxed(self._saved, key, parameter) else loaded.to(parameter.device)

    def _keeps_steps_on_host(self, parameter: torch.Tensor) -> bool:
        group = next(g for g in self._view.param_groups if any(p is parameter for p in g["params"]))
        return not (group.get("capturable") or group.get("fused"))


def _nothing() -> dict[str, Any]:
    return {"state": {}, "shapes": {}, "param_groups": []}


def _merged_groups(known: list[Any], more: list[Any]) -> list[Any]:
    """Hyper-parameters of the first, parameters of all."""
    if not known:
        return more
    return [one | {"params": [*one["params"], *other["params"]]} for one, other in zip(known, more, strict=False)]


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


def _wants(saved: Saved, value: Any, parameter: torch.Tensor, old: Any) -> Iterator[Want]:
    for key in documents.tensor_names(value):
        boxed = _is_boxed(saved, key, parameter)
        want = saved.want_box(key, *local_chunk(parameter)) if boxed else saved.want_whole(key)
        in_place = boxed and isinstance(old, torch.Tensor) and documents.kind_of(value) == "$tensor"
        yield into(want, old) if in_place else want


def _is_boxed(saved: Saved, key: str, parameter: torch.Tensor) -> bool:
    """Moments have the parameter's shape, so they are sharded as it is; counters and the like are whole."""
    return parameter.dim() > 0 and saved.tensor(key).shape == tuple(parameter.shape)
