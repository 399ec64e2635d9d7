"""nn.Module: plain, DDP, FSDP1, FSDP2 and compiled, under the model's own names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dcpsvc.errors import UnsupportedStateError
from dcpsvc.state import extrastates, fsdp1, inner, meta, origin, refill
from dcpsvc.state.base import Base, source
from dcpsvc.state.buffers import Buffers
from dcpsvc.state.collected import Collected, Sharing
from dcpsvc.state.extrastates import ExtraStates
from dcpsvc.state.fingerprint import BASE
from dcpsvc.state.ragged import Ragged
from dcpsvc.state.saved import Saved, Want, own_name
from dcpsvc.state.sharing import Cast, Part, Replicated, bare
from dcpsvc.state.wrappers import Names, unwrap

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dcpsvc.state.sharing import Validate

Only = Literal["all", "trainable"]


class ModuleComponent:
    """A module's parameters and buffers.

    Args:
        name: Its name in the state.
        given: The module, or :class:`~dcpsvc.state.sharing.Replicated` or :class:`~dcpsvc.state.sharing.Part` of one.

    Attributes:
        module: Without what wraps it.
        sharded: Its parameters that FSDP1 manages.
        part: The declaration that this is only a part of the model; None if it is all of it.
        validate: How replicas are compared.
        dtype: In which floating-point tensors are stored; None: their own.
        only: ``trainable`` leaves out parameters that need no gradient, and buffers that training does not change.
        given: As it stands in the state.
    """

    def __init__(self, name: str, given: Any, only: Only = "all") -> None:
        self.name, self.module, self.given = name, unwrap(bare(given)), given
        self.only, self._names = only, Names(self.module)
        self._buffers = Buffers(self.module, self._names) if only == "trainable" else None
        self._trained: set[str] = set()
        self.part = given if isinstance(given, Part) else None
        self._base = None if self._buffers is None else Base(self.module, self._buffers, self.part)
        self.dtype = given.dtype if isinstance(given, Cast) else None
        self.validate: Validate = given.validate if isinstance(given, Replicated) else "hash"
        self.sharded = fsdp1.Sharded(name, self.module, self._names)
        self._extras = ExtraStates(name, self.module, self._names)

    def named_parameters(self) -> list[tuple[str, torch.Tensor]]:
        """Every parameter under every name it has; what FSDP1 manages as what of it is here."""
        named = self.module.named_parameters(remove_duplicate=False)
        if not self.sharded:
            return [(self._names(name), parameter) for name, parameter in named]
        managed = {id(member.given) for member in self.sharded.members}
        found: dict[str, torch.Tensor] = {self._names(name): p for name, p in named if id(p) not in managed}
        found |= {member.name: member.ragged for member in self.sharded.members}
        return list((found | {name: found[of] for name, of in self.sharded.aliases.items()}).items())

    def parameter_names(self) -> dict[int, str]:
        """FQN of each parameter, by ``id``; the first name of a tied one."""
        names: dict[int, str] = {}
        for name, parameter in self.named_parameters():
            names.setdefault(id(parameter), name)
        return names

    def collect(self, into: Collected) -> None:
        """Parameters are sharded or replicated; buffers are rank 0's; tied weights are stored once."""
        buffers = self._needed(into.rank)
        about = extrastates.encoded(self.name, self._about(into, buffers))
        if self.part is None:
            into.documents[self.name] = about
        else:
            into.own_documents[own_name(self.name, into.rank)] = about
        first_names: dict[int, str] = {}
        own = self._own()
        for key, value in self._kept(self._state(), buffers).items():
            if not isinstance(value, torch.Tensor):
                self._collect_value(into, key, value)
            elif id(value) not in own and not key.endswith(extrastates.SUFFIX):
                raise UnsupportedStateError(
                    key, "its state_dict() gives a copy here, not the parameter or buffer itself"
                )
            elif self._alone(value) or not self._is_tied(into, key, value, first_names):
                self._collect_tensor(into, key, value)

    def wants(self, saved: Saved) -> list[Want]:
        """Every tensor of the module; names must be the same on both sides."""
        mine = {key: value for key, value in self._state().items() if isinstance(value, torch.Tensor)}
        needed: set[str] = set()
        if self._buffers is not None:
            saved_too = {key for key, value in mine.items() if refill.has(saved, key, value)}
            self._trained |= {key for key in saved_too if _is_parameter(mine[key])}
            self._buffers.keep({self._without_name(key) for key in saved_too})
            needed = saved_too | self._with_name(self._buffers.always())
            self._check_base(saved, saved_too)
        if self.part is None:
            self._note_unused(saved, mine)
            self._extras.note(saved, [key for key in self._state() if key not in mine])
        saved.drift.own |= self.part is not None and self.part.holder == saved.rank
        mine = self._kept(mine, needed)
        there = {key for key, value in mine.items() if refill.has(saved, key, value)}
        tied = {id(mine[key]) for key in there}  # by one of its names it is there: others may know no ties
        wanted = {key: value for key, value in mine.items() if key in there or id(value) not in tied}
        return [want for key, value in wanted.items() for want in self._wanted(saved, key, value)]

    def apply(self, saved: Saved, tensors: Mapping[str, torch.Tensor]) -> None:
        """Overwrite in place, so optimizers keep their parameters; what is on the meta device gets memory."""
        self.sharded.reshard()
        for key, value in self._state().items():
            if not isinstance(value, torch.Tensor) or saved.terms.skips(key):
                continue
            theirs = saved.saved_name(key)
            loaded = tensors.get(theirs)
            if loaded is not None and key.endswith(extrastates.SUFFIX):
                self._extras.put(key, loaded.to(value.device))
            elif loaded is not None and value.device.type == "meta":
                meta.assign(self.module, value, loaded)
            else:
                refill.put(theirs, value, tensors, saved.rank)
        self._extras.put_values(saved)

    def versions(self, *, parameters_too: bool) -> list[int]:
        """Changes when a buffer, or a parameter, was written to."""
        tensors = [*self.module.buffers(), *(self.module.parameters() if parameters_too else ())]
        return [inner.version(tensor) for tensor in tensors]

    def _kept(self, state: dict[str, Any], buffers: set[str]) -> dict[str, Any]:
        """What is saved of the module's state: all, or what training may change, or has before it was frozen."""
        if self.only == "all":
            return state
        self._trained |= {key for key, v in state.items() if _is_parameter(v) and _is_trained(v)}
        return {
            key: value
            for key, value in state.items()
            if key in self._trained or key.endswith(extrastates.SUFFIX) or (key in buffers and not _is_parameter(value))
        }

    def _note_unused(self, saved: Saved, mine: Mapping[str, Any]) -> None:
        """What the checkpoint has of the module, and the module has not, or takes under another name."""
        prefix = f"{saved.saved_name(self.name)}."
        for theirs in (key for key in saved.layout.names() if key.startswith(prefix)):
            key = saved.terms.name_here(theirs)
            if saved.terms.skips(key) or _is_inside(key, mine):
                continue
            if key not in mine:
                saved.drift.add(key, "unexpected", saved.described(theirs), "-")
            elif saved.saved_name(key) != theirs:
                saved.drift.let_pass(theirs, "unexpected", saved.described(theirs), f"{saved.saved_name(key)} instead")

    def _needed(self, rank: int) -> set[str]:
        """Buffers that this rank saves, where not all are: those of which it has a part, and of others the holder."""
        if self._buffers is None:
            return set()
        return self._with_name(self._buffers.needed() if rank == self._holder else self._buffers.cut())

    @property
    def _holder(self) -> int:
        """Whose buffers count."""
        return 0 if self.part is None else self.part.holder

    def _alone(self, value: torch.Tensor) -> bool:
        """Whether other ranks may know nothing of it: of a part of a model, or a buffer that its holder saves."""
        return self.part is not None or (
            self._buffers is not None and not _is_parameter(value) and not isinstance(value, DTensor)
        )

    def _with_name(self, names: Iterable[str]) -> set[str]:
        return {f"{self.name}.{name}" for name in names}

    def _without_name(self, key: str) -> str:
        return key.removeprefix(f"{self.name}.")

    def _own(self) -> set[int]:
        return {id(tensor) for tensor in (*(p for _, p in self.named_parameters()), *self.module.buffers())}

    def _about(self, into: Collected, buffers: set[str]) -> dict[str, Any]:
        about = origin.described(self.module, self._names)
        if self._base is not None:
            saved = {self._without_name(key) for key in buffers}
            base, sums = self._base.described(into.rank, self._frozen(), saved)
            into.bases[self.name] = self._base.said(base["name"], sums)
            shared = sums is not None and self.part is None
            about["base"] = base | ({"whole": f"{sums.whole:016x}"} if shared and sums is not None else {})
        return about

    def _frozen(self) -> list[tuple[str, torch.Tensor]]:
        """Parameters that are not saved, each once."""
        names = self.parameter_names()
        named = {names[id(parameter)]: parameter for _, parameter in self.named_parameters()}
        return [(n, p) for n, p in named.items() if not _is_trained(p) and f"{self.name}.{n}" not in self._trained]

    def _check_base(self, saved: Saved, saved_too: set[str]) -> None:
        """An adapter over another base is of no use, and no shape would tell."""
        about = next(iter(saved.own_documents(self.name)), None) if self.part is not None else None
        about = about or saved.documents.get(saved.saved_name(self.name))
        theirs = about.get("base") if isinstance(about, dict) else None
        key = f"{self.name}.{BASE}"
        if not theirs or saved.terms.skips(key) or self._base is None:
            return
        mine, sums = self._base.described(saved.rank, self._frozen(), {self._without_name(key) for key in saved_too})
        saved.bases[self.name] = self._base.said(saved.saved_name(self.name), sums, mine["name"])
        if theirs.get("structure") != mine["structure"]:
            texts = [f"{base.get('name') or 'unnamed'} (structure {base.get('structure')})" for base in (theirs, mine)]
            saved.drift.add(key, "base", *texts)

    def _wanted(self, saved: Saved, key: str, value: torch.Tensor) -> list[Want]:
        if key.endswith(extrastates.SUFFIX):
            return saved.want_like(key, value)
        return refill.wants(saved, key, value, cast=self._stored(value) is not None)

    def _stored(self, value: torch.Tensor) -> torch.dtype | None:
        return self.dtype if value.is_floating_point() and not inner.is_wrapper(value) else None

    def _is_tied(self, into: Collected, key: str, value: torch.Tensor, first_names: dict[int, str]) -> bool:
        """Whether it is stored under its first name. Not in a part: other ranks know nothing of this alias."""
        first = first_names.setdefault(id(value), key)
        return first != key and into.add_alias(key, value, first)

    def _collect_tensor(self, into: Collected, key: str, value: torch.Tensor) -> None:
        owner = into.owners.get(id(source(value)))
        if self._alone(value):
            alike = self.part.ranks if self.part is not None and _is_parameter(value) else ()  # of buffers: the holder
            stored = None if self.part is not None else self._stored(value)
            into.add_part(key, value, self._holder, owner=owner, alike=alike, stored=stored)
        else:
            shared = Sharing.REPLICATED if _is_parameter(value) else Sharing.FIRST
            into.add(key, value, shared, owner=owner, validate=self.validate, stored=self._stored(value))

    def _collect_value(self, into: Collected, key: str, value: Any) -> None:
        if self.part is not None:
            raise UnsupportedStateError(key, "an extra state that is no tensor, in a Part; register it as a buffer")
        into.documents[key] = extrastates.encoded(key, value)

    def _state(self) -> dict[str, Any]:
        state = self._sharded_state() if self.sharded else self.module.state_dict(keep_vars=True)
        return {
            f"{self.name}.{self._names(name)}": value
            for name, value in state.items()
            if not (name.endswith(extrastates.SUFFIX) and value is None)
        }

    def _sharded_state(self) -> dict[str, Any]:
        """As ``state_dict()`` would give it, whose hooks are where FSDP1 gathers parameters; so no hooks are run."""
        state: dict[str, Any] = {}
        for path, child in self.module.named_modules(remove_duplicate=False):
            cast("Any", child)._save_to_state_dict(state, f"{path}." if path else "", keep_vars=True)  # noqa: SLF001 - see above
        managed = {id(member.given) for member in self.sharded.members}
        found = {self._names(name): value for name, value in state.items() if id(value) not in managed}
        return found | {name: p for name, p in self.named_parameters() if isinstance(p, Ragged)}


def _is_inside(key: str, state: Mapping[str, Any]) -> bool:
    """Whether a saved name is that of something inside a tensor of the state, which says itself what does not fit."""
    return any(mark in ".@" and key[:at] in state for at, mark in enumerate(key))


def _is_parameter(value: Any) -> bool:
    return isinstance(value, nn.Parameter | Ragged)


def _is_trained(parameter: torch.Tensor) -> bool:
    return source(parameter).requires_grad
