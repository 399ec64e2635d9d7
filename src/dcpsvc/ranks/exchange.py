"""A gloo group of all ranks for passing on large pieces: what one rank has read goes to those who need it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from dcpsvc.ranks.c10d import Group
from dcpsvc.ranks.messages import LostPeerError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Parcel(NamedTuple):
    """Bytes for or from another rank; both name it by the same tag.

    Attributes:
        peer: The other rank.
        tag: Unique among all that are under way.
        view: Their memory.
    """

    peer: int
    tag: int
    view: memoryview


class Exchange(Group):
    """A group that also passes bytes from rank to rank. One thread."""

    def swap(self, outgoing: Sequence[Parcel], incoming: Sequence[Parcel]) -> None:
        """Send and receive all of these; returns when both are done. Every rank calls it, each with its own.

        Raises:
            LostPeerError: A peer did not do its part in time; the group is of no use from then on.
        """
        group = self._group
        if group is None:
            if outgoing or incoming:
                raise LostPeerError("the group is closed")
            return
        try:
            works = [group.recv([_tensor(parcel)], parcel.peer, parcel.tag) for parcel in incoming]
            works += [group.send([_tensor(parcel)], parcel.peer, parcel.tag) for parcel in outgoing]
            for work in works:
                work.wait()
        except RuntimeError as err:
            self.poisoned = True
            raise LostPeerError(str(err)) from None


def _tensor(parcel: Parcel) -> torch.Tensor:
    return torch.frombuffer(parcel.view, dtype=torch.uint8)
