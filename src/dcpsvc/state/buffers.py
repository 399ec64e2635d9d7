"""Buffers of a model of which only a part is trained: which of them training changes, so that a checkpoint holds them.

A base may have gigabytes of them (weights in 4 bits, tables of positions), which a fresh process has by itself.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage] - what all of them have in common

from dcpsvc.state import fingerprint, inner

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import torch
    from torch import nn

    _Parts = list[tuple[nn.Module, dict[str, torch.Tensor]]]

_MODULUS = 1 << 64


class Buffers:
    """The persistent ones of a module, compared with what they were when this was made.

    They are looked at again only where torch has seen one of the same part of the model written to, or replaced; one
    that had been before anybody looked counts as changed.

    Args:
        module: Without what wraps it.
        fqn: The name of what is at a path in it.
    """

    def __init__(self, module: nn.Module, fqn: Callable[[str], str]) -> None:
        self._module, self._fqn = module, fqn
        self._seen = {name: _Seen(tensor) for _, tensors in self._parts() for name, tensor in tensors.items()}
        self._sums: dict[str, int | None] = {}
        self._changed: set[str] = set()

    def needed(self) -> set[str]:
        """Those that belong into a checkpoint: :meth:`always`, and whatever has another value than in the beginning."""
        parts = self._parts()
        self._look(parts)
        return _always_of(parts) | self._changed

    def always(self) -> set[str]:
        """Of parts with a parameter that is trained, or with running statistics, which forward changes; and cut ones.

        Looks at no value: the same on all ranks.
        """
        return _always_of(self._parts())

    def cut(self) -> set[str]:
        """Those of which each rank has a part."""
        return {name for _, tensors in self._parts() for name, one in tensors.items() if isinstance(one, DTensor)}

    def keep(self, names: Collection[str]) -> None:
        """They have changed before this was made: a checkpoint has them."""
        self._changed |= {name for name in self._seen if name in names}

    def total(self, but: Collection[str]) -> int | None:
        """The fingerprint of all others together; None if some have no values yet."""
        parts = self._parts()
        self._look(parts)
        found = 0
        for name, tensor in ((name, one) for _, tensors in parts for name, one in tensors.items()):
            if name in but or isinstance(tensor, DTensor):
                continue
            known = name in self._sums and name not in self._changed
            total = self._sums[name] if known else fingerprint.of(name, tensor)
            if total is None:
                return None
            found += total
        return found % _MODULUS

    def _look(self, parts: _Parts) -> None:
        for part, tensors in parts:
            waiting = {
                name: one for name, one in tensors.items() if name not in self._changed and not _always(part, one)
            }
            moved = any(name not in self._seen or self._seen[name].is_past(tensor) for name, tensor in waiting.items())
            for name, tensor in waiting.items():
                if not moved and name in self._sums:
                    continue
                now = fingerprint.of(name, tensor)
                if moved and (name not in self._sums or self._sums[name] != now):
                    self._changed.add(name)
                self._sums[name] = now
                self._seen[name] = _Seen(tensor)

    def _parts(self) -> _Parts:
        """Each part of the module with the persistent ones of its own, by their names in the whole."""
        found: _Parts = []
        for path, part in self._module.named_modules(remove_duplicate=False):
            inside = cast("Any", part)  # torch has no other way to tell which are persistent
            if inside._buffers:  # noqa: SLF001 - see above
                own, passing = part.named_buffers(path, recurse=False), inside._non_persistent_buffers_set  # noqa: SLF001 - see above
                kept = {self._fqn(name): one for name, one in own if name.rpartition(".")[2] not in passing}
                found.append((part, kept))
        return found


def _always_of(parts: _Parts) -> set[str]:
    return {name for part, tensors in parts for name, one in tensors.items() if _always(part, one)}


def _always(part: nn.Module, buffer: torch.Tensor) -> bool:
    trained = any(parameter.requires_grad for parameter in part.parameters(recurse=False))
    return trained or isinstance(buffer, DTensor) or (isinstance(part, _NormBase) and part.track_running_stats)


class _Seen:
    """What torch tells of a tensor without reading it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = weakref.ref(tensor), inner.version(tensor)

    def is_past(self, tensor: torch.Tensor) -> bool:
        """Whether it is another one now, or was written to."""
        return self._tensor() is not tensor or self._version != inner.version(tensor)
