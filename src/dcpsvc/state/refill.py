"""Loading into tensors that are there: a plain one, or the plain ones inside a wrapper that was made as the saved one.

Nothing is made of a name that stands in a file: a wrapper of another class, shape or context is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from dcpsvc.errors import StateMismatchError
from dcpsvc.state import documents, inner
from dcpsvc.state.drift import described
from dcpsvc.state.ragged import Ragged
from dcpsvc.state.saved import Saved, Want, copy_into, like

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_ONLY = "; what is inside each part is of that part alone, so only the same mesh can load it"


def has(saved: Saved, key: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is in the checkpoint, as one or as those inside it."""
    theirs = saved.saved_name(key)
    return saved.layout.find(theirs) is not None or _record(saved, theirs, tensor) is not None


def wants(
    saved: Saved, key: str, tensor: torch.Tensor, *, saved_key: str = "", cast: bool = False, live: bool = True
) -> list[Want]:
    """Ask for what this rank holds of a tensor; where it is not what was saved, that is noted instead.

    Args:
        saved: The checkpoint.
        key: Of the state.
        tensor: As the state has it.
        saved_key: Its name in the checkpoint, where that is not what ``rename`` makes of the key.
        cast: Any floating-point dtype will do for a plain one.
        live: Whether it is memory of the state, and may be read into where it is.

    Raises:
        StateMismatchError: A wrapper is on the meta device.
    """
    theirs = saved_key or saved.saved_name(key)
    if saved.terms.skips(key):
        return []
    there = _record(saved, theirs, tensor)
    if not inner.is_wrapper(tensor):
        if there is None:
            ask = saved.want_in_place if live else saved.want_like
            return ask(key, tensor, saved_key=saved_key, cast=cast)
        saved.drift.add(key, "kind", inner.told(there), described(tensor))
    elif tensor.is_meta:
        reason = "on the meta device, and nothing is made of names in files; make it as it was made for the save"
        raise StateMismatchError(key, f"a {type(inner.local_of(tensor)).__name__} {reason}")
    elif _fits(saved, key, theirs, tensor, there):
        pairs = zip(inner.parts(key, tensor, saved.rank), inner.parts(theirs, tensor, saved.rank).items(), strict=True)
        return [want for name, (its, part) in pairs for want in wants(saved, name, part, saved_key=its, live=live)]
    return []


def put(saved_key: str, tensor: torch.Tensor, loaded: Mapping[str, torch.Tensor], rank: int) -> torch.Tensor:
    """A tensor of the state, overwritten, or those inside it, with what was asked for.

    Args:
        saved_key: Its name in the checkpoint.
        tensor: As the state has it.
        loaded: What was read, by name in the checkpoint; of what was let pass there is nothing.
        rank: This one.
    """
    if inner.is_wrapper(tensor):
        for name, part in inner.parts(saved_key, tensor, rank).items():
            put(name, part, loaded, rank)
    elif saved_key in loaded:
        copy_into(tensor, loaded[saved_key])
    return tensor


def taken(template: torch.Tensor | None, saved_key: str, loaded: Mapping[str, torch.Tensor], rank: int) -> torch.Tensor:
    """What was read as a tensor of the template's kind; a wrapper is the template itself, overwritten."""
    if template is None or not inner.is_wrapper(template):
        return like(template, loaded[saved_key])
    return put(saved_key, template, loaded, rank)


def decoded(value: Any, path: str, old: Any, loaded: Callable[[str], torch.Tensor]) -> Any:
    """A saved value; a tensor goes into the old one where that fits, so captured graphs stay valid."""

    def tensor(key: str) -> torch.Tensor:
        new = loaded(key)
        if (
            not isinstance(old, torch.Tensor)
            or isinstance(new, Ragged)
            or old.dtype != new.dtype
            or old.shape != new.shape
        ):
            return new
        copy_into(old, new.to_local() if isinstance(new, DTensor) else new)
        return old

    return documents.decode(value, path, tensor)


def _record(saved: Saved, theirs: str, tensor: torch.Tensor) -> dict[str, Any] | None:
    names = inner.parts(theirs, tensor, saved.rank) if inner.is_wrapper(tensor) else ()
    return saved.record(theirs, names)


def _fits(saved: Saved, key: str, theirs: str, tensor: torch.Tensor, there: dict[str, Any] | None) -> bool:
    """Whether a wrapper was made as the saved one; noted if it was not."""
    here = inner.record(key, tensor)
    if there is None:
        plain = saved.layout.find(theirs)
        if plain is not None:
            saved.drift.add(key, "kind", saved.described(theirs), inner.told(here))
        else:
            saved.drift.add(key, "missing", "-", inner.told(here))
        return False
    odd = next((name for name in inner.FIELDS if there.get(name) != here.get(name)), None)
    if odd is not None:
        why = _ONLY if odd == "sharding" else ""
        saved.drift.add(key, odd, _text(there.get(odd)), _text(here.get(odd)) + why)
    return odd is None


def _text(field: Any) -> str:
    return ", ".join(field) if isinstance(field, dict) and not any(field.values()) else str(field)
