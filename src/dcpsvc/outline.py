"""What one rank writes for one attempt: where each tensor lies in the file, and what comes before and behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from dcpsvc.format import shardfile
from dcpsvc.format.parse import compact

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from dcpsvc.format.shardfile import Placement


class Large(NamedTuple):
    """A tensor that takes its time to copy.

    Attributes:
        number: Which one, in the order of the file.
        origin: What training writes to, as far as torch counts writes.
        owner: ``id`` of the optimizer that alone changes it; None: anybody may.
    """

    number: int
    origin: torch.Tensor
    owner: int | None


class Outline:
    """What one rank writes for one attempt; nothing is copied yet.

    Attributes:
        placement: Where each piece lies in the file.
        sources: The tensors, or views of them, in the order of the file. Their dtype may be another than the file's.
        header: The file's first bytes.
        objects: Its JSON documents.
        nbytes: Of the file up to its block table.
        large: Sources that may be copied after the others, in the order of the file.
    """

    def __init__(
        self,
        placement: Placement,
        sources: Sequence[torch.Tensor],
        documents: Mapping[str, Any],
        metadata: Mapping[str, str],
        large: Sequence[Large] = (),
    ) -> None:
        self.placement, self.sources, self.large = placement, list(sources), list(large)
        self.objects = compact(documents)
        self.header = shardfile.header(placement, len(self.objects), metadata)
        self.nbytes = placement.tensors_end + len(self.objects)

    def forget(self) -> None:
        """Let go of the tensors."""
        self.sources.clear()
        self.large.clear()
