"""A gloo group of all ranks for passing on large pieces: what a rank has goes to those who need it, and to no other."""

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

    def gather(self, data: bytearray, sizes: Sequence[int]) -> list[bytearray]:
        """On rank 0 what every rank gave, in rank order; nothing on the others, which receive one byte.

        All leave together, when rank 0 has everything: so nobody runs ahead, to wait for rank 0 through several calls.

        Args:
            data: Of this rank.
            sizes: How many bytes each gives, as all ranks know.

        Raises:
            LostPeerError: A peer did not do its part in time; the group is of no use from then on.
        """
        said: list[bytearray] = []
        if self._rank == 0:
            said = [data, *map(bytearray, sizes[1:])]
            self.swap([], [Parcel(rank, 0, memoryview(said[rank])) for rank in range(1, len(said)) if sizes[rank]])
        else:
            self.swap([Parcel(0, 0, memoryview(data))] if data else [], [])
        self.broadcast(torch.zeros(1, dtype=torch.uint8))
        return said


def _tensor(parcel: Parcel) -> torch.Tensor:
    return torch.frombuffer(parcel.view, dtype=torch.uint8)
