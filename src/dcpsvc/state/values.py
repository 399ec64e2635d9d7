"""Everything that is neither a module nor an optimizer: Statefuls, tensors, JSON-like values, per-rank values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dcpsvc.errors import StateMismatchError
from dcpsvc.state import documents, inner, refill
from dcpsvc.state.collected import Collected, Sharing
from dcpsvc.state.metrics import check_kept
from dcpsvc.state.rng import Rng
from dcpsvc.state.saved import Saved, Want, copy_into, own_name
from dcpsvc.state.sharing import Declared, OneRank, PerGroup, PerRank, Replicated, bare

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from dcpsvc.state.sharing import Resize, Validate

_HELD_BY = "$rank"
"""Stands for a value that another rank holds."""

_ELSEWHERE = object()


def is_stateful(value: Any) -> bool:
    """Whether a value brings its own ``state_dict()`` and ``load_state_dict()``."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


class ValueComponent:
    """A Stateful, or a plain value that lives in the user's mapping.

    Args:
        name: Its name in the mapping.
        state: The user's mapping; a plain value that is not a tensor or a dict is replaced in it.
    """

    def __init__(self, name: str, state: MutableMapping[str, Any]) -> None:
        self._name, self._state = name, state

    @property
    def _given(self) -> Any:
        return self._state[self._name]

    @property
    def _is_own(self) -> bool:
        """Whether ranks have different values."""
        return isinstance(self._given, PerRank | PerGroup | OneRank | Rng)

    def collect(self, into: Collected) -> None:
        """One document, and its tensors under dotted names."""
        given = self._given
        if isinstance(given, OneRank) and given.rank != into.rank:
            into.own_documents[own_name(self._name, into.rank)] = {_HELD_BY: given.rank}
            return
        tensors: dict[str, torch.Tensor] = {}
        if not self._is_own:
            validate: Validate = given.validate if isinstance(given, Replicated) else "hash"
            into.documents[self._name] = documents.encode(self._current(), self._name, tensors)
            for key, tensor in tensors.items():
                into.add(key, tensor, Sharing.REPLICATED, validate=validate)
            return
        alike = given.ranks if isinstance(given, PerGroup) else (into.rank,)
        first = alike[0]
        document = documents.encode(self._current(), own_name(self._name, first), tensors)
        into.own_documents[own_name(self._name, into.rank)] = document
        for key, tensor in tensors.items():
            into.add_value(key, tensor, alike)

    @property
    def resize(self) -> Resize | None:
        """What becomes of it when the number of ranks has changed; None where that makes no difference."""
        return self._given.resize if isinstance(self._given, PerRank | Rng) else None

    def wants(self, saved: Saved) -> list[Want]:
        """Every tensor the document refers to, in the box this rank holds of it now."""
        match self.resize if saved.resized else None:
            case "strict":
                here = f"{saved.ranks} ranks, and resize is 'strict'"
                saved.drift.add(self._name, "ranks", f"{saved.world_size} ranks", here)
                return []
            case "reseed":
                return []
            case resize if callable(resize):
                values = self._of_all(saved)
                if documents.wrapper_names(values):
                    raise StateMismatchError(self._name, "holds tensors made of others: no function can be given those")
                names = documents.tensor_names(values)
                return [saved.want_whole(key) for key in names]
            case _:
                return self._wanted(saved)

    def _wanted(self, saved: Saved) -> list[Want]:
        document = self._document(saved)
        if document is _ELSEWHERE or not self._is_of_kind(saved, document):
            return []
        templates = self._templates(saved, document)
        found: list[Want] = []
        for key in documents.tensor_names(document) + (wrappers := documents.wrapper_names(document)):
            here = saved.terms.name_here(key)
            if key in templates:
                found += refill.wants(saved, here, templates[key], saved_key=key, live=False)
            elif key in wrappers:
                saved.drift.add(here, "kind", inner.told(saved.record(key) or inner.UNKNOWN), "no tensor")
            else:
                found.append(saved.want_whole(key))
        return found

    def apply(self, saved: Saved, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the value back, in place where the object allows it."""
        target, resize = bare(self._given), self.resize if saved.resized else None
        if resize == "reseed":
            if callable(reseed := getattr(target, "reseed", None)):
                reseed(saved.step, saved.rank)
            return
        if callable(resize):
            values = [documents.decode(each, self._name, tensors.__getitem__) for each in self._of_all(saved)]
            self._take(resize(values, saved.rank, saved.ranks))
            return
        document = self._document(saved)
        if document is _ELSEWHERE:
            return
        templates = self._templates(saved, document)
        if isinstance(target, torch.Tensor):
            refill.put(next(iter(templates)), target, tensors, saved.rank)
            return

        def taken(key: str) -> torch.Tensor:
            return refill.taken(templates.get(key), key, tensors, saved.rank)

        self._take(documents.decode(document, self._name, taken))
        if isinstance(target, Rng) and saved.rank >= saved.world_size:
            target.reseed(saved.step, saved.rank)

    def _take(self, value: Any) -> None:
        target = bare(self._given)
        if is_stateful(target):
            target.load_state_dict(value)
        elif isinstance(target, torch.Tensor):
            copy_into(target, value)
        elif isinstance(target, dict):
            target.clear()
            target.update(value)
        elif isinstance(self._given, Declared):
            self._given.value = value
        else:
            self._state[self._name] = value

    def _of_all(self, saved: Saved) -> list[Any]:
        """What each rank had that wrote the checkpoint."""
        name = saved.saved_name(self._name)
        found = saved.documents_by_rank(name, range(saved.world_size))
        if None in found:
            raise StateMismatchError(name, f"the checkpoint holds nothing of that name of rank {found.index(None)}")
        return found

    def _document(self, saved: Saved) -> Any:
        """What this rank takes over, or that another rank has it."""
        given, name = self._given, saved.saved_name(self._name)
        if isinstance(given, OneRank) and given.rank != saved.rank:
            return _ELSEWHERE
        if name in saved.documents:
            return saved.documents[name]
        mine = own_name(name, saved.source_rank)
        if mine not in saved.documents:
            raise StateMismatchError(name, "the checkpoint holds nothing of that name")
        own = saved.documents[mine]
        if not self._is_own:
            reason = "saved as a value of each rank, here it is shared by all; wrap it in PerRank, or skip it"
            raise StateMismatchError(self._name, reason)
        return saved.document_of(own[_HELD_BY], name) if isinstance(own, dict) and list(own) == [_HELD_BY] else own

    def _is_of_kind(self, saved: Saved, document: Any) -> bool:
        """A tensor or a dict is loaded in place, so it must have been one."""
        target = bare(self._given)
        if isinstance(target, Rng):
            self._compare_generators(saved, document, target)
        if is_stateful(target):
            return True
        kinds = {torch.Tensor: "$tensor", dict: "dict"}
        here = next((name for kind, name in kinds.items() if isinstance(target, kind)), "value")
        there = documents.kind_of(document)
        if here in {there, "value"}:
            return True
        saved.drift.add(self._name, "kind", there.strip("$"), type(target).__name__)
        return False

    def _compare_generators(self, saved: Saved, document: Any, target: Rng) -> None:
        theirs, mine = {name: one["kind"] for name, one in document.get("own", {}).items()}, target.kinds
        for name in sorted(theirs.keys() | mine.keys()):
            there, here = theirs.get(name, "-"), mine.get(name, "-")
            kind = "missing" if there == "-" else "unexpected" if here == "-" else "kind"
            if there != here:
                saved.drift.add(f"{self._name}.own.{name}", kind, there, here)

    def _current(self) -> Any:
        target = bare(self._given)
        if isinstance(target, torch.nn.Module):
            check_kept(self._name, target)
        return target.state_dict() if is_stateful(target) else target

    def _templates(self, saved: Saved, document: Any) -> dict[str, torch.Tensor]:
        """The value's tensors as they are now, by the names they were saved under.

        Only what must keep its kind: a tensor given as such, DTensors, and what is made of others. Others may change
        shape.
        """
        target = bare(self._given)
        names = documents.tensor_names(document) + documents.wrapper_names(document)
        if isinstance(target, torch.Tensor):
            return {names[0]: target}
        now: dict[str, torch.Tensor] = {}
        component = names[0].split(".", 1)[0] if names else saved.saved_name(self._name)  # may carry a rank
        documents.encode(self._current(), component, now)
        return {key: t for key, t in now.items() if hasattr(t, "device_mesh") or inner.is_wrapper(t)}
