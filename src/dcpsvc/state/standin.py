"""What an optimizer keeps of a parameter, as its first step makes it: for what can only be loaded into one like it."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from typing import TYPE_CHECKING, Any, cast

import torch

from dcpsvc.errors import StateMismatchError
from dcpsvc.state import documents, inner, refill

if TYPE_CHECKING:
    from dcpsvc.state.optimview import View
    from dcpsvc.state.saved import Saved, Want


_DICTS = (dict, defaultdict, OrderedDict)
_LISTS = (list, deque)


class Entries:
    """The state of each parameter, or such as its optimizer would begin with.

    Args:
        view: Of the optimizer, as it is now.
    """

    def __init__(self, view: View) -> None:
        self._view, self._state = view, view.state
        self._begun: dict[torch.Tensor, dict[str, Any]] = {}

    def of(self, name: str, parameter: torch.Tensor) -> dict[str, Any]:
        """All entries of a parameter, by their names. Raises what :func:`begun` does.

        Args:
            name: For errors.
            parameter: Of the optimizer.
        """
        if there := self._state.get(parameter):
            return there
        if parameter not in self._begun:
            self._begun[parameter] = begun(name, self._view, parameter)
        return self._begun[parameter]

    def wants(self, saved: Saved, key: str, parameter: torch.Tensor, value: Any) -> list[Want] | None:
        """What an entry needs that is made of other tensors, there or here; None if it is not.

        Args:
            saved: The checkpoint.
            key: Of the entry, whose own name is the last in it.
            parameter: Of the optimizer.
            value: The document of the entry.
        """
        theirs = documents.wrapper_names(value)
        known = self.of(key, parameter) if theirs else self._state.get(parameter, {})
        here = known.get(key.rpartition(".")[2])
        if isinstance(here, torch.Tensor) and (theirs or inner.is_wrapper(here)):
            names = [*theirs, *documents.tensor_names(value)]
            return [want for name in names for want in refill.wants(saved, key, here, saved_key=name)]
        if theirs:
            saved.drift.add(key, "kind", inner.told(saved.record(theirs[0]) or inner.UNKNOWN), "no tensor")
        return [] if theirs else None


def begun(name: str, view: View, parameter: torch.Tensor) -> dict[str, Any]:
    """The entries, of no use but for their kinds: the step is done on zeros, by an optimizer of the same options.

    Neither parameters, state, hooks, dicts and lists of the optimizer nor generators are touched, and nothing is
    compiled for it. Tensors and objects that it keeps beside its state are the very same: a step that writes to them
    does so here, too. A step with collectives fails or waits for other ranks: it is not for this.

    Args:
        name: Of the state, for errors.
        view: Of the optimizer whose ``step()`` makes them.
        parameter: Of it; the memory of another one, and of its gradient, is taken meanwhile.

    Raises:
        StateMismatchError: It cannot be done so.
    """
    devices = [] if parameter.is_cpu else [parameter.device]
    if (found := view.stepped(parameter)) is None:
        raise StateMismatchError(name, "was saved of a kind that an optimizer makes only of whole parameters")
    try:
        optimizer, group = found
        zeros = torch.nn.Parameter(torch.zeros_like(parameter.detach()))
        zeros.grad = torch.zeros_like(parameter.detach())
        aside = object.__new__(type(optimizer))
        changed = {"state": defaultdict[Any, Any](dict), "param_groups": [group | {"params": [zeros]}]}
        known = {id(optimizer.state): changed["state"], id(optimizer.param_groups): changed["param_groups"]}
        aside.__dict__.update({name: _copied(value, known) for name, value in optimizer.__dict__.items()} | changed)
        step = cast("Any", type(optimizer).step)
        bare = step.__wrapped__ if getattr(step, "hooked", False) else step
        kind = parameter.device.type
        with torch.random.fork_rng(devices, device_type=kind), torch.compiler.set_stance("force_eager"):
            bare(aside)
        return cast("dict[str, Any]", aside.state[zeros])
    except Exception as err:  # whatever the step of somebody else's optimizer does: it is told, nothing is touched
        reason = (
            "was saved of a kind that only the optimizer can make, and it has none yet: call its step() once before"
        )
        raise StateMismatchError(name, f"{reason} ({type(err).__name__}: {err})") from err


def _copied(value: Any, known: dict[int, Any]) -> Any:
    """A plain container anew, with those in it, for a step may count there; anything else is itself.

    Args:
        value: What an optimizer keeps.
        known: By ``id``, what stands for a container already.
    """
    if id(value) in known:
        return known[id(value)]
    if type(value) in _DICTS:
        found = known[id(value)] = copy.copy(value)
        found.update({key: _copied(item, known) for key, item in value.items()})
        return found
    if type(value) in _LISTS:
        found = known[id(value)] = copy.copy(value)
        for at, item in enumerate(value):
            found[at] = _copied(item, known)
        return found
    if type(value) is tuple:
        return tuple(_copied(item, known) for item in value)
    return copy.copy(value) if type(value) is set else value
