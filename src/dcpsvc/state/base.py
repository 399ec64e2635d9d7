"""What a checkpoint of an adapter leaves out of its module: recognised by names, shapes and a sum over the values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpsvc.state import fingerprint, inner, origin
from dcpsvc.state.fingerprint import Said, Sums
from dcpsvc.state.ragged import Ragged

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import torch
    from torch import nn

    from dcpsvc.state.buffers import Buffers
    from dcpsvc.state.sharing import Part


class Base:
    """Of one module.

    Args:
        module: Without what wraps it.
        buffers: Its persistent ones.
        part: The declaration that it is only a part of the model; None if it is all of it.
    """

    def __init__(self, module: nn.Module, buffers: Buffers, part: Part | None) -> None:
        self._module, self._buffers, self._part = module, buffers, part
        self._known: tuple[list[tuple[str, int, int]], dict[str, str], Sums | None] | None = None

    def described(
        self, rank: int, frozen: Sequence[tuple[str, torch.Tensor]], saved: Collection[str]
    ) -> tuple[dict[str, str], Sums | None]:
        """Names and shapes of the parameters, values of them and of all buffers but ``saved``, which one rank has.

        Taken anew only of what is another, or torch saw written to.
        """
        seen = [(name, id(source(one)), inner.version(source(one))) for name, one in frozen]
        if self._known is None or self._known[0] != seen:
            base = {"structure": origin.structure(frozen), "name": origin.base_name(self._module)}
            holder = None if self._part is None else self._part.holder
            self._known = (seen, base, fingerprint.sums(frozen, rank, holder))
        _, base, found = self._known
        if found is None or rank != (0 if self._part is None else self._part.holder):
            return base, found
        rest = self._buffers.total(saved)
        return base, None if rest is None else found.plus(rest)

    def said(self, name: str, sums: Sums | None, here: str = "") -> Said:
        """What a rank tells the others about it."""
        return Said(name, sums and sums.counted, None if sums is None or self._part is not None else sums.whole, here)


def source(parameter: torch.Tensor) -> torch.Tensor:
    """What training writes to."""
    return parameter.origin if isinstance(parameter, Ragged) else parameter
